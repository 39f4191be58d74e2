"""CausalConv1d against ONNX's and ONNX Runtime's CausalConvWithState, transformers' Qwen3.5, and float64."""

import importlib.util

import numpy as np
import onnx
import pytest
import torch
from hypothesis import example as example_of
from hypothesis import given, settings
from hypothesis import strategies as st
from one_node import body_model, rtx_build, run_operator, session
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import causal_conv1d_fn, causal_conv1d_update

from llmexport.plugins.causal_conv1d import causal_conv1d
from llmexport.validate.compare import compare

TOKENS = [1, 2, 7, 63, 64, 65, 130]
CHANNELS, TAPS = 10, 4
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FP32 = float(np.finfo(np.float32).eps)
ACTIVATIONS = ["none", "silu"]
SIZES = {"C": CHANNELS, "O": 1, "K": TAPS, "S": TAPS - 1}


def example(
    tokens: int, dtype: torch.dtype = torch.float32, channels: int = CHANNELS, taps: int = TAPS, batch: int = 2
) -> tuple[torch.Tensor, ...]:
    """x, weight, a state that is not zero, and bias."""
    seed = torch.Generator().manual_seed(tokens)
    shapes = [(batch, tokens, channels), (channels, 1, taps), (batch, taps - 1, channels), (channels,)]
    x, weight, state, bias = (torch.randn(s, generator=seed).to(dtype) for s in shapes)
    return x, weight, state, bias


def numbers(value: torch.Tensor) -> np.ndarray:
    return value.double().numpy()


def to_the_last(x: torch.Tensor) -> torch.Tensor:
    """The ends of rows without padding behind them."""
    return torch.full((len(x),), x.shape[1], dtype=torch.int32)


def close(x: torch.Tensor, weight: torch.Tensor, state: torch.Tensor, bias: torch.Tensor | None) -> float:
    """One fp32 rounding for each product and sum, and four for a SiLU, of terms of the largest sum there can be."""
    largest = max(numbers(t).max(initial=0, where=True) for t in (x.abs(), state.abs()))
    terms = largest * numbers(weight.abs()).sum(-1).max() + (0 if bias is None else numbers(bias.abs()).max())
    return float((weight.shape[-1] + 5) * FP32 * terms)


def exact(
    x: torch.Tensor, weight: torch.Tensor, state: torch.Tensor, bias: torch.Tensor | None
) -> tuple[np.ndarray, np.ndarray]:
    """The sums in float64 before the activation, and the next state."""
    seen = np.concatenate((numbers(state), numbers(x)), 1)
    tokens, taps = x.shape[1], weight.shape[-1]
    y = sum(numbers(weight)[:, 0, i] * seen[:, i : i + tokens] for i in range(taps))
    return y + (0 if bias is None else numbers(bias)), seen[:, tokens:]


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_is_the_formula_in_float64(tokens, dtype, with_bias):
    x, weight, state, bias = example(tokens, dtype)
    bias = bias if with_bias else None
    sums, after = exact(x, weight, state, bias)
    half = torch.finfo(dtype).eps / 2
    for activation in ACTIVATIONS:
        y, next_state = causal_conv1d(x, weight, state, to_the_last(x), bias, activation)
        # The sum is rounded to the dtype; a SiLU, of slope up to 1.1, is rounded once more.
        expected = silu(sums) if activation == "silu" else sums
        bound = close(x, weight, state, bias) + half * 1.1 * np.abs(sums)
        bound = bound + (half * np.abs(expected) if activation == "silu" else 0)
        assert y.dtype == dtype
        assert (np.abs(numbers(y) - expected) <= bound).all()
        assert compare(after, numbers(next_state)).max_abs == 0


@settings(max_examples=30, deadline=None, derandomize=True)
@given(sizes=st.tuples(*[st.integers(1, n) for n in (12, 9, 6, 3)]))
def test_is_the_formula_at_any_size(sizes):
    x, weight, state, bias = example(sizes[0], torch.float32, *sizes[1:])
    expected, after = exact(x, weight, state, bias)
    y, next_state = causal_conv1d(x, weight, state, to_the_last(x), bias, "none")
    assert compare(expected, numbers(y)).max_abs <= close(x, weight, state, bias)
    assert compare(after, numbers(next_state)).max_abs == 0


@pytest.mark.parametrize(("domain", "opset"), [("", 27), ("com.microsoft", 1)], ids=["onnx", "ONNX Runtime"])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(st.integers(1, 140), st.integers(1, 12), st.integers(2, 6), st.integers(1, 3)),
    with_bias=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
)
@example_of(sizes=(130, CHANNELS, TAPS, 2), with_bias=True, activation="silu")
def test_equals_causal_conv_with_state_channels_last(domain, opset, sizes, with_bias, activation):
    if not domain and not onnx.defs.has("CausalConvWithState"):
        pytest.skip("this onnx is older than opset 27, which has CausalConvWithState")
    x, weight, state, bias = example(sizes[0], torch.float32, *sizes[1:])
    bias = bias if with_bias else None
    given = [x.mT.numpy(), weight.numpy(), None if bias is None else bias.numpy(), state.mT.numpy()]
    y, after = run_operator("CausalConvWithState", domain, opset, given, 2, activation=activation)
    found, found_after = causal_conv1d(x, weight, state, to_the_last(x), bias, activation)
    assert compare(y.swapaxes(1, 2), found.numpy()).max_abs <= close(x, weight, state, bias)
    assert compare(after.swapaxes(1, 2), found_after.numpy()).max_abs == 0


@pytest.mark.parametrize("tokens", TOKENS)
def test_of_a_zero_state_is_transformers_prefill(tokens):
    x, weight, state, bias = example(tokens)
    zeros = torch.zeros_like(state)
    expected = causal_conv1d_fn(x.mT, weight[:, 0], bias, "silu").mT
    y, _ = causal_conv1d(x, weight, zeros, to_the_last(x), bias, "silu")
    assert compare(numbers(expected), numbers(y)).max_abs <= close(x, weight, zeros, bias)


@pytest.mark.parametrize("tokens", TOKENS)
def test_of_a_state_is_transformers_update(tokens):
    x, weight, state, bias = example(tokens)
    carried = state.mT.clone()
    expected = causal_conv1d_update(x.mT, carried, weight[:, 0], bias, "silu").mT
    y, after = causal_conv1d(x, weight, state, to_the_last(x), bias, "silu")
    assert compare(numbers(expected), numbers(y)).max_abs <= close(x, weight, state, bias)
    assert torch.equal(after, carried.mT)


@pytest.mark.parametrize("cuts", [[1] * 65, [2] * 32 + [1], [1, 64], [63, 2]], ids=str)
def test_a_state_carried_over_cuts_gives_the_to_the_last(cuts):
    x, weight, state, bias = example(65)
    whole, last = causal_conv1d(x, weight, state, to_the_last(x), bias, "silu")
    ys, carried = [], state
    for part in x.split(cuts, 1):
        y, carried = causal_conv1d(part, weight, carried, to_the_last(part), bias, "silu")
        ys.append(y)
    assert compare(numbers(whole), numbers(torch.cat(ys, 1))).max_abs <= close(x, weight, state, bias)
    assert torch.equal(carried, last)


def test_a_channel_sees_itself_alone():
    x, weight, state, bias = example(7)
    y, _ = causal_conv1d(x, weight, state, to_the_last(x), bias, "silu")
    x[..., 3], state[..., 3] = 100, 100
    changed, _ = causal_conv1d(x, weight, state, to_the_last(x), bias, "silu")
    assert (changed != y).any((0, 1)).tolist() == [c == 3 for c in range(CHANNELS)]


@pytest.mark.parametrize("tokens", [1, 2, 7, 63])
def test_behind_padding_the_state_is_that_of_the_tokens_alone(tokens):
    x, weight, state, bias = example(tokens, batch=tokens + 1)
    end = torch.arange(tokens + 1, dtype=torch.int32)
    y, found = causal_conv1d(x, weight, state, end, bias, "silu")
    for row in range(tokens + 1):
        alone, before, own = x[row : row + 1, :row], state[row : row + 1], found[row : row + 1]
        assert torch.equal(causal_conv1d(alone, weight, before, to_the_last(alone), bias, "silu")[1], own)
    assert torch.equal(y, causal_conv1d(x, weight, state, to_the_last(x), bias, "silu")[0])


def test_an_unknown_activation_is_refused():
    x, *others, bias = example(1)
    with pytest.raises(ValueError, match="'relu'"):
        causal_conv1d(x, *others, to_the_last(x), bias, "relu")


@pytest.mark.parametrize("target", ["portable", "onnxruntime"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_body_in_onnx_runtime_equals_the_reference_at_any_length(target, dtype, with_bias, activation):
    model = body_model(
        "CausalConv1d", {"activation": activation}, dtype, SIZES, without=int(not with_bias), target=target
    )
    runtime = session(model)
    for tokens in TOKENS:
        x, weight, state, bias = example(tokens, getattr(torch, dtype))
        # The second row has padding behind its tokens.
        end = torch.tensor([tokens, tokens // 2], dtype=torch.int32)
        tensors = (x, weight, state, end, bias) if with_bias else (x, weight, state, end)
        y, after = causal_conv1d(x, weight, state, end, bias if with_bias else None, activation)
        feeds = dict(zip((i.name for i in model.graph.input), (t.numpy() for t in tensors), strict=True))
        found, found_after = runtime.run(None, feeds)
        assert found.dtype == np.dtype(dtype)
        # A sum in another order may round to the next fp16 number, and the SiLU of it again.
        ulp = 0.0 if dtype == "float32" else float(np.finfo(dtype).eps)
        sums = np.abs(exact(x, weight, state, bias if with_bias else None)[0])
        assert (np.abs(found - numbers(y)) <= close(x, weight, state, bias) + 2 * ulp * sums).all()
        assert compare(numbers(after), found_after).max_abs == 0


@pytest.mark.parametrize(
    ("target", "dtype", "operators"),
    [
        ("onnxruntime", "float32", {("com.microsoft", "CausalConvWithState")}),
        ("onnxruntime", "float16", set()),
        ("portable", "float32", set()),
    ],
)
def test_the_body_for_onnx_runtime_alone_says_whose_operator_it_has(target, dtype, operators):
    body = body_model("CausalConv1d", {"activation": "silu"}, dtype, SIZES, target=target).functions[0]
    assert {(n.domain, n.op_type) for n in body.node if n.domain} == operators
    assert {(o.domain, o.version) for o in body.opset_import} == {("", 23), *((d, 1) for d, _ in operators)}


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="pip install tensorrt-rtx")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.engine
def test_rtx_builds_the_body(dtype, tmp_path):
    model = body_model("CausalConv1d", {"activation": "silu"}, dtype, SIZES)
    assert rtx_build(model, {"B": (1, 2, 4), "T": (1, 63, 512)}, tmp_path) == ["built"]
