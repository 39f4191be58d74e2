"""GatedAct against transformers' activations and GPT-OSS, ONNX's Gelu and SwiGLU, and float64."""

import math
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from transformers.activations import ACT2FN
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.phi3.modeling_phi3 import Phi3Config, Phi3MLP

from llmexport.export.trace import trace_body
from llmexport.plugins.gated_act import gated_act
from llmexport.plugins.spec import DOMAIN

SIZES = [(1, 1, 1), (1, 1, 65), (2, 63, 33), (1, 130, 7)]  # B, T, I
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FP32 = float(np.finfo(np.float32).eps)
ALPHA, LIMIT = 1.702, 7.0  # of GPT-OSS
PUBLISHED = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh", "gelu_erf": "gelu"}


def example(size: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """gate and up, some of them beyond LIMIT on both sides."""
    seed = torch.Generator().manual_seed(sum(size))
    gate, up = (torch.randn(size, generator=seed) * 5 for _ in range(2))
    return gate.to(dtype), up.to(dtype)


def numbers(value: torch.Tensor) -> np.ndarray:
    return value.double().numpy()


def onnx_operator(op: str, opset: int, feeds: dict[str, np.ndarray], **attributes: object) -> np.ndarray:
    """One operator in the onnx reference evaluator."""
    values = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in (*feeds, "y")]
    node = onnx.helper.make_node(op, list(feeds), ["y"], **attributes)
    graph = onnx.helper.make_graph([node], "g", values[:-1], values[-1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    return ReferenceEvaluator(model).run(None, feeds)[0]


@pytest.mark.parametrize("activation", PUBLISHED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_is_transformers_activation_in_fp32_times_up_rounded_once(size, dtype, activation):
    gate, up = example(size, dtype)
    expected = (ACT2FN[PUBLISHED[activation]](gate.float()) * up.float()).to(dtype)
    assert torch.equal(gated_act(gate, up, activation, 0.0, 0.0), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_swiglu_clamped_is_gpt_oss_in_fp32_rounded_once(size, dtype):
    gate, up = example(size, dtype)
    interleaved = torch.stack((gate, up), -1).flatten(-2).float()
    expected = GptOssExperts._apply_gate(SimpleNamespace(alpha=ALPHA, limit=LIMIT), interleaved).to(dtype)
    assert torch.equal(gated_act(gate, up, "swiglu_clamped", ALPHA, LIMIT), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_halves_are_those_of_phi3(size, dtype):
    """Phi3MLP, its projections the identity, in fp32 and rounded once."""
    gate, up = example(size, dtype)
    both = torch.cat((gate, up), -1)
    mlp = Phi3MLP(Phi3Config(hidden_size=1, intermediate_size=1))
    mlp.gate_up_proj, mlp.down_proj = torch.nn.Identity(), torch.nn.Identity()
    assert torch.equal(gated_act(both, None, "silu", 0.0, 0.0), mlp(both.float()).to(dtype))


def test_swiglu_clamped_clamps_the_gate_from_above_only():
    gate, up = torch.tensor([[[100.0, -3.0, -100.0]]]), torch.ones(1, 1, 3)
    y = gated_act(gate, up, "swiglu_clamped", 0.0, 2.0)
    assert y.tolist() == [[[2.0, -3.0, -100.0]]]  # alpha = 0 makes the sigmoid 1/2, up + 1 is 2


def test_swiglu_clamped_clamps_up_on_both_sides():
    gate, up = torch.full((1, 1, 3), 2.0), torch.tensor([[[100.0, 1.5, -100.0]]])
    y = gated_act(gate, up, "swiglu_clamped", 0.0, 2.0)
    assert y.tolist() == [[[3.0, 2.5, -1.0]]]


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("size", SIZES)
def test_gelu_equals_onnx_gelu_times_up(size, approximate):
    gate, up = example(size)
    expected = onnx_operator("Gelu", 20, {"x": gate.numpy()}, approximate=approximate) * up.numpy()
    found = gated_act(gate, up, {"none": "gelu_erf", "tanh": "gelu_tanh"}[approximate], 0.0, 0.0)
    # Where gate is far below zero, 1 + erf and 1 + tanh cancel: what is left is the rounding of the 1.
    bound = 4 * FP32 * np.abs(numbers(gate) * numbers(up))
    assert (np.abs(found.numpy() - expected) <= bound).all()


@pytest.mark.skipif(not onnx.defs.has("SwiGLU"), reason="this onnx is older than opset 28, which has SwiGLU")
@settings(max_examples=20, deadline=None, derandomize=True)
@given(size=st.tuples(*[st.integers(1, n) for n in (3, 9, 70)]))
def test_silu_equals_onnx_swiglu_at_any_size(size):
    gate, up = example(size)
    expected = onnx_operator("SwiGLU", 28, {"gate": gate.numpy(), "up": up.numpy()}, alpha=1.0)
    found = gated_act(gate, up, "silu", 0.0, 0.0).numpy()
    # exp, the quotient and the products round once each.
    assert (np.abs(found - expected) <= 6 * FP32 * np.abs(expected)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [*PUBLISHED, "swiglu_clamped"])
def test_is_the_formula_in_float64(activation, dtype):
    gate, up = example((2, 63, 33), dtype)
    g, u = numbers(gate), numbers(up)
    if activation == "silu":
        exact = g / (1 + np.exp(-g)) * u
    elif activation == "gelu_tanh":
        exact = 0.5 * g * (1 + np.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) * u
    elif activation == "gelu_erf":
        exact = 0.5 * g * (1 + np.vectorize(math.erf)(g / math.sqrt(2))) * u
    else:
        g, u = np.minimum(g, LIMIT), np.clip(u, -LIMIT, LIMIT)
        exact = g / (1 + np.exp(-ALPHA * g)) * (u + 1)
    found = numbers(gated_act(gate, up, activation, ALPHA, LIMIT))
    # A handful of fp32 roundings of terms up to |gate * up|, then at most half a unit of the result's dtype.
    bound = 8 * FP32 * np.abs(g) * (np.abs(u) + 1) + torch.finfo(dtype).eps / 2 * np.abs(exact)
    tiny = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    assert (np.abs(found - exact) <= bound + tiny).all()


@pytest.mark.parametrize("activation", [*PUBLISHED, "swiglu_clamped"])
def test_large_gates_give_no_nan(activation):
    gate = torch.tensor([[[-3e4, -1e2, 1e2, 3e4]]])
    y = gated_act(gate, torch.ones(1, 1, 4), activation, ALPHA, LIMIT)
    assert y.isfinite().all()


def test_an_unknown_activation_is_refused():
    gate, up = example((1, 1, 3))
    with pytest.raises(ValueError, match="'relu'"):
        gated_act(gate, up, "relu", 0.0, 0.0)


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize(
    ("activation", "dtype"),
    [
        *((a, "float32") for a in (*PUBLISHED, "swiglu_clamped")),
        ("silu", "float16"),
        ("gelu_tanh", "float16"),
    ],
)
def test_body_in_onnx_runtime_equals_the_reference_at_other_sizes(activation, dtype, halves):
    attributes = {"activation": activation, "alpha": ALPHA, "limit": LIMIT}
    inputs = {"gate": "J"} if halves else {"gate": "I", "up": "I"}
    shapes = [["B", "T", last] for last in inputs.values()]
    body = trace_body("GatedAct", attributes, [dtype] * len(inputs), shapes)
    element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    values = [onnx.helper.make_tensor_value_info(n, element, s) for n, s in zip(inputs, shapes, strict=True)]
    result = onnx.helper.make_tensor_value_info("y", element, ["B", "T", "I"])
    node = onnx.helper.make_node(body.name, [*inputs], ["y"], domain=DOMAIN, **attributes)
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", values, [result]),
        functions=[body],
        opset_imports=[onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    # exp, tanh and erf are approximated anew in every library, to a few fp32 epsilons of a term of order
    # |gate * up|; an fp16 result may then round to its next number.
    ulp = 0.0 if dtype == "float32" else float(np.finfo(dtype).eps)
    for size in SIZES:
        gate, up = example(size, getattr(torch, dtype))
        expected = numbers(gated_act(gate, up, activation, ALPHA, LIMIT))
        given = [torch.cat((gate, up), -1)] if halves else [gate, up]
        found = session.run(None, {n: x.numpy() for n, x in zip(inputs, given, strict=True)})[0]
        terms = np.abs(numbers(gate)) * (np.abs(numbers(up)) + 1)
        assert (np.abs(found - expected) <= 4 * FP32 * terms + ulp * np.abs(expected)).all()
