"""Wkv against the paper's sums in float64, and transformers' RWKV."""

import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_node import body_model, rtx_build, session
from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

from llmexport.plugins.wkv import wkv
from llmexport.validate.compare import compare

TOKENS = [1, 7, 63, 64, 65, 130]
CHANNELS = 10
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# A mean of values of order one, in fp32. Each token rounds exponents of up to 20 to 2**-20, and of the tokens of a row
# those that still count add up.
CLOSE = 1e-5

Inputs = tuple[torch.Tensor, ...]


def example(
    tokens: int, dtype: torch.dtype = torch.float32, channels: int = CHANNELS, batch: int = 2, keys: float = 3.0
) -> Inputs:
    """Keys, values, all tokens present, decays from nearly none to nearly all, and states as after two tokens."""
    seed = torch.Generator().manual_seed(tokens)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=seed)

    key, value = keys * randn(batch, tokens, channels), randn(batch, tokens, channels)
    time_decay, time_first = 3 * randn(channels), randn(channels)
    older, states = 1 + torch.rand(batch, channels, generator=seed), randn(2, batch, channels)
    present = torch.ones(batch, tokens)
    return *(x.to(dtype) for x in (key, value, present)), time_decay, time_first, states[0], older, 5 * states[1]


def begun(inputs: Inputs) -> Inputs:
    """The same at the beginning of a sequence."""
    return *inputs[:5], *(torch.zeros_like(s) for s in inputs[5:])


def numbers(value: torch.Tensor) -> np.ndarray:
    return value.double().numpy()


def exact(inputs: Inputs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y and the two sums, not divided by anything, in float64; a row without tokens has the sums 0."""
    key, value, present, time_decay, time_first, numerator, denominator, maximum = map(numbers, inputs)
    scale = np.where(denominator == 0, 0, np.exp(maximum))
    n, d, y = numerator * scale, denominator * scale, np.zeros_like(value)
    for t in range(key.shape[1]):
        bonus, weight = np.exp(time_first + key[:, t]), np.exp(key[:, t])
        y[:, t] = (n + bonus * value[:, t]) / (d + bonus)
        seen, kept = present[:, t, None] != 0, np.exp(-np.exp(time_decay))
        n, d = np.where(seen, kept * n + weight * value[:, t], n), np.where(seen, kept * d + weight, d)
    return y, n, d


def errors(expected: tuple[np.ndarray, ...], found: Inputs) -> list[float]:
    """Of y, of the mean that the states hold, and of their weight, relative to it."""
    y, n, d = expected
    found_y, numerator, denominator, maximum = map(numbers, found)
    mean, weight = n / d, denominator * np.exp(maximum)
    return [compare(y, found_y).max_abs, compare(mean, numerator / denominator).max_abs, abs(weight / d - 1).max()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_is_the_papers_sums_in_float64(tokens: int, dtype: torch.dtype) -> None:
    inputs = example(tokens, dtype)
    of_y, of_mean, of_weight = errors(exact(inputs), wkv(*inputs))
    assert of_y <= CLOSE + (0 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)
    assert of_mean <= CLOSE
    # The exponents, up to 20, are rounded at each token.
    assert of_weight <= 1e-4


@settings(max_examples=30, deadline=None, derandomize=True)
@given(sizes=st.tuples(*[st.integers(1, n) for n in (12, 6, 3)]), hidden=st.integers(0, 12))
def test_is_the_sums_at_any_size_with_padding_anywhere(sizes: tuple[int, int, int], hidden: int) -> None:
    inputs = example(sizes[0], torch.float32, *sizes[1:])
    inputs[2][-1, hidden // 2 : hidden] = 0
    assert max(errors(exact(inputs), wkv(*inputs))) <= 1e-4


@pytest.mark.parametrize("tokens", TOKENS)
def test_is_transformers_with_a_state_and_without(tokens: int) -> None:
    key, value, _, time_decay, time_first, *states = inputs = example(tokens)
    expected, after = rwkv_linear_attention_cpu(time_decay, time_first, key, value, states, True)
    y, *found = wkv(*inputs)
    assert compare(expected.numpy(), y.numpy()).max_abs <= CLOSE
    for theirs, ours in zip(after, found, strict=True):
        assert compare(theirs.numpy(), ours.numpy()).max_abs <= CLOSE
    expected, after = rwkv_linear_attention_cpu(time_decay, time_first, key, value, None, True)
    y, *found = wkv(*begun(inputs))
    assert compare(expected.numpy(), y.numpy()).max_abs <= CLOSE
    for theirs, ours in zip(after, found, strict=True):
        assert compare(theirs.numpy(), ours.numpy()).max_abs <= CLOSE


@pytest.mark.parametrize("shift", [-300.0, 300.0])
def test_no_exponent_overflows_and_none_is_lost(shift: float) -> None:
    """exp(300) is beyond fp32, and so is exp(-300)."""
    key, *others = begun(example(65))
    y, *_ = wkv(key, *others)
    shifted, *_ = wkv(key + shift, *others)
    # Each token rounds exponents of 300 to 2**-16.
    assert compare(y.numpy(), shifted.numpy()).max_abs <= 65 * 2.0**-16


def test_zeros_are_the_beginning_whatever_else_an_empty_state_says() -> None:
    """A first key far below 0 is no less than all that was seen."""
    key, *others = begun(example(7))
    key = key - 200
    y, *states = wkv(key, *others)
    assert torch.equal(y[:, 0], others[0][:, 0])
    odd = *others[:-3], torch.ones_like(others[-3]), others[-2], 50 + others[-1]
    for first, second in zip((y, *states), wkv(key, *odd), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("padding", [1, 6, 64])
def test_padding_moves_no_state(padding: int) -> None:
    """A row padded on the left, and one padded on the right, are the row alone."""
    key, value, present, *others = begun(example(65 + padding))
    present[0, :padding], present[1, -padding:] = 0, 0
    y, *states = wkv(key, value, present, *others)
    for row, tokens in enumerate((slice(padding, None), slice(0, 65))):
        alone = (x[row : row + 1, tokens] for x in (key, value, present))
        y_alone, *states_alone = wkv(*alone, *others[:2], *(s[row : row + 1] for s in others[2:]))
        assert torch.equal(y[row : row + 1, tokens], y_alone)
        for s, s_alone in zip(states, states_alone, strict=True):
            assert torch.equal(s[row : row + 1], s_alone)
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("cuts", [[1] * 65, [1, 64], [63, 2]], ids=str)
def test_states_carried_over_cuts_give_the_whole(cuts: list[int]) -> None:
    *sequences, time_decay, time_first, numerator, denominator, maximum = example(65)
    states = (numerator, denominator, maximum)
    whole = wkv(*sequences, time_decay, time_first, *states)
    ys = []
    for parts in zip(*(s.split(cuts, 1) for s in sequences), strict=True):
        y, *states = wkv(*parts, time_decay, time_first, *states)
        ys.append(y)
    for found, expected in zip((torch.cat(ys, 1), *states), whole, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_is_in_fp32_and_rounded_once(dtype: torch.dtype) -> None:
    inputs = example(65, dtype)
    y, *states = wkv(*(x.float() for x in inputs))
    found, *found_states = wkv(*inputs)
    assert torch.equal(found, y.to(dtype))
    assert all(map(torch.equal, states, found_states))


def test_no_state_is_changed_in_place() -> None:
    inputs = example(7)
    before = [s.clone() for s in inputs]
    wkv(*inputs)
    assert all(map(torch.equal, inputs, before))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_body_in_onnx_runtime_equals_the_reference_at_any_length(dtype: str) -> None:
    model = body_model("Wkv", {}, dtype, {"C": CHANNELS})
    runtime, names = session(model), [i.name for i in model.graph.input]
    for tokens in TOKENS:
        inputs = example(tokens, getattr(torch, dtype))
        inputs[2][-1, : tokens // 2] = 0
        for given_inputs in (inputs, begun(inputs)):
            expected = wkv(*given_inputs)
            found = runtime.run(None, dict(zip(names, (x.numpy() for x in given_inputs), strict=True)))
            assert found[0].dtype == np.dtype(dtype)
            ulp = 0.0 if dtype == "float32" else float(np.finfo(dtype).eps)
            bound = CLOSE + ulp * np.abs(numbers(expected[0]))
            assert (np.abs(found[0] - numbers(expected[0])) <= bound).all()
            for theirs, ours in zip(expected[1:], found[1:], strict=True):
                assert (np.abs(ours - theirs.numpy()) <= CLOSE * np.maximum(1, theirs.abs().numpy())).all()


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="pip install tensorrt-rtx")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.engine
def test_rtx_builds_the_body(dtype, tmp_path):
    model = body_model("Wkv", {}, dtype, {"C": CHANNELS})
    assert rtx_build(model, {"B": (1, 2, 4), "T": (1, 63, 512)}, tmp_path) == ["built"]
