"""GatedRmsNorm against transformers' Qwen3.5, ONNX's RMSNormalization, and float64."""

import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_node import body_model, rtx_build, run_operator, session
from onnx.reference import ReferenceEvaluator
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeRMSNormGated

from llmexport.plugins.gated_rms_norm import gated_rms_norm

SIZES = [(1, 1, 1, 1), (2, 7, 3, 33), (1, 63, 2, 128), (2, 130, 1, 10)]  # B, T, H, D
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FP32 = float(np.finfo(np.float32).eps)
EPSILON = 1e-6
ACTIVATIONS = ["silu", "sigmoid"]


def example(size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """x, of rows of different magnitudes, gate and weight."""
    seed = torch.Generator().manual_seed(sum(size))
    x, gate, rows = (torch.randn(s, generator=seed) for s in (size, size, (*size[:-1], 1)))
    weight = 1 + 0.2 * torch.randn(size[-1], generator=seed)
    return (x * torch.exp(2 * rows)).to(dtype), (3 * gate).to(dtype), weight.to(dtype)


def numbers(value: torch.Tensor) -> np.ndarray:
    return value.double().numpy()


def activated(gate: np.ndarray, activation: str) -> np.ndarray:
    return (gate if activation == "silu" else 1) / (1 + np.exp(-gate))


def bound(expected: np.ndarray, size: int, dtype: torch.dtype, roundings: int) -> np.ndarray:
    """fp32: the sum of squares rounds `size` times at most, and a root halves it; some more for all the rest.
    Then the half units of the dtype, and its least number."""
    tiny = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    relative = (size / 2 + 8) * FP32 + roundings * torch.finfo(dtype).eps / 2 * 1.01
    return relative * np.abs(expected) + (roundings + 1) * tiny


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_rounded_before_weight_is_qwen3_5(size, dtype):
    x, gate, weight = example(size, dtype)
    module = Qwen3_5MoeRMSNormGated(size[-1], eps=EPSILON).to(dtype)
    module.weight.data = weight
    with torch.no_grad():
        expected = module(x, gate)
    assert torch.equal(gated_rms_norm(x, gate, weight, EPSILON, "silu", True), expected)


@pytest.mark.parametrize("round_before_weight", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_is_the_formula_in_float64(size, dtype, activation, round_before_weight):
    x, gate, weight = example(size, dtype)
    wide = numbers(x)
    rms = np.sqrt((wide**2).mean(-1, keepdims=True) + EPSILON)
    expected = wide / rms * numbers(weight) * activated(numbers(gate), activation)
    found = gated_rms_norm(x, gate, weight, EPSILON, activation, round_before_weight)
    assert found.dtype == dtype
    roundings = 3 if round_before_weight else 1
    assert (np.abs(numbers(found) - expected) <= bound(expected, size[-1], dtype, roundings)).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_that_rounding_all_is_in_fp32_and_rounded_once(dtype, activation):
    x, gate, weight = example((2, 63, 3, 33), dtype)
    expected = gated_rms_norm(x.float(), gate.float(), weight.float(), EPSILON, activation, False).to(dtype)
    assert torch.equal(gated_rms_norm(x, gate, weight, EPSILON, activation, False), expected)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    size=st.tuples(*[st.integers(1, n) for n in (3, 9, 4, 70)]),
    activation=st.sampled_from(ACTIVATIONS),
    epsilon=st.sampled_from([1e-5, 1e-6, 0.1]),
)
def test_is_onnx_rms_normalization_times_the_gate_at_any_size(size, activation, epsilon):
    x, gate, weight = example(size)
    (normed,) = run_operator("RMSNormalization", "", 23, [x.numpy(), weight.numpy()], 1, axis=-1, epsilon=epsilon)
    expected = normed * activated(numbers(gate), activation)
    found = gated_rms_norm(x, gate, weight, epsilon, activation, False)
    assert (np.abs(found.numpy() - expected) <= bound(expected, 2 * size[-1], torch.float32, 1)).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_heads_of_zeros_and_large_gates_give_no_nan(activation):
    x, gate = torch.zeros(1, 2, 2, 4), torch.tensor([-3e4, -1e2, 1e2, 3e4]).expand(1, 2, 2, 4).contiguous()
    assert gated_rms_norm(x, gate, torch.ones(4), EPSILON, activation, True).tolist() == x.tolist()
    assert gated_rms_norm(x + 1, gate, torch.ones(4), EPSILON, activation, True).isfinite().all()


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="'relu'"):
        gated_rms_norm(*example((1, 1, 1, 3)), EPSILON, "relu", True)


@pytest.mark.parametrize("round_before_weight", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_body_in_onnx_runtime_equals_the_reference_at_other_sizes(dtype, activation, round_before_weight):
    attributes = {"epsilon": EPSILON, "activation": activation, "round_before_weight": round_before_weight}
    model = body_model("GatedRmsNorm", attributes, dtype, {})
    runtime = session(model)
    for size in SIZES:
        x, gate, weight = example(size, getattr(torch, dtype))
        y = numbers(gated_rms_norm(x, gate, weight, **attributes))
        (found,) = runtime.run(None, {"x": x.numpy(), "gate": gate.numpy(), "weight": weight.numpy()})
        assert found.dtype == np.dtype(dtype)
        # ONNX Runtime multiplies fp16 in fp32 on the CPU and leaves out the roundings in between: that is half a
        # unit for each of the reference's, and half a unit for its own.
        roundings = (4 if round_before_weight else 2) if dtype == "float16" else 0
        # Its logistic function is exact to a few fp32 units of one, not of its value.
        terms = np.abs(numbers(weight)) * np.sqrt(size[-1]) * np.maximum(np.abs(numbers(gate)), 1)
        assert (np.abs(found - y) <= bound(y, size[-1], getattr(torch, dtype), roundings) + 4 * FP32 * terms).all()


@pytest.mark.parametrize("round_before_weight", [True, False])
def test_body_rounds_where_the_reference_does(round_before_weight):
    x, gate, weight = example((2, 130, 2, 64), torch.float16)
    attributes = {"epsilon": EPSILON, "activation": "silu", "round_before_weight": round_before_weight}
    evaluator = ReferenceEvaluator(body_model("GatedRmsNorm", attributes, "float16", {}))
    (found,) = evaluator.run(None, {"x": x.numpy(), "gate": gate.numpy(), "weight": weight.numpy()})
    same, other = (
        gated_rms_norm(x, gate, weight, EPSILON, "silu", r) for r in (round_before_weight, not round_before_weight)
    )
    # A few fp32 units of difference take one fp16 rounding in 2^13 / 8 elsewhere; roundings left out, every third.
    assert (found != same.numpy()).mean() < 0.01
    assert (found != other.numpy()).mean() > 0.1


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="pip install tensorrt-rtx")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.engine
def test_rtx_builds_the_body(dtype, tmp_path):
    attributes = {"epsilon": EPSILON, "activation": "silu", "round_before_weight": True}
    model = body_model("GatedRmsNorm", attributes, dtype, {"H": 3, "D": 33})
    assert rtx_build(model, {"B": (1, 2, 4), "T": (1, 63, 512)}, tmp_path) == ["built"]
