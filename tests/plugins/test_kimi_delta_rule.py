"""KimiDeltaRule against a float64 recurrence and transformers, and its body in ONNX Runtime and TensorRT-RTX."""

import importlib.util

import numpy as np
import pytest
import torch
from one_node import body_model, rtx_build, session
from transformers.models.kimi_linear.modeling_kimi_linear import recurrent_kimi_delta_attention

from llmexport.plugins.kimi_delta_rule import kimi_delta_rule
from llmexport.validate.compare import compare

SIZES = {"H": 3, "D": 16, "V": 12}
SCALE = SIZES["D"] ** -0.5
# Of values of order one, in fp32: the contract of the op, as of GatedDeltaRule.
CLOSE = 1e-5
DECAYS = ["none", "weak", "mixed", "total"]

Inputs = tuple[torch.Tensor, ...]


def example(tokens: int, dtype: torch.dtype = torch.float32, decays: str = "mixed") -> Inputs:
    """q, k, v, g, beta and a state that is not zero, B = 2."""
    seed = torch.Generator().manual_seed(tokens)
    h, d, v = SIZES.values()

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(2, *shape, generator=seed)

    chance = torch.rand(2, tokens, h, d, generator=seed)
    g = {
        "none": torch.zeros_like(chance),
        "weak": -1e-4 * chance,
        "mixed": torch.where(chance < 0.2, -20.0, -1e-2 * chance),
        "total": torch.where(chance < 0.1, -torch.inf, -0.1),
    }[decays]
    beta = torch.rand(2, tokens, h, generator=seed)
    q, k, values = randn(tokens, h, d), randn(tokens, h, d), randn(tokens, h, v)
    return q.to(dtype), k.to(dtype), values.to(dtype), g, beta.to(dtype), randn(h, d, v)


def numbers(value: torch.Tensor) -> np.ndarray:
    return value.double().numpy()


def recurrence(inputs: Inputs, l2_norm: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """y and the next state in float64, token by token."""
    q, k, v, g, beta, state = map(numbers, inputs)
    if l2_norm:
        q, k = (x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    y = np.zeros_like(v)
    for t in range(v.shape[1]):
        state = np.exp(g[:, t, :, :, None]) * state
        error = beta[:, t, :, None] * (v[:, t] - np.einsum("bhd,bhdv->bhv", k[:, t], state))
        state = state + np.einsum("bhd,bhv->bhdv", k[:, t], error)
        y[:, t] = SCALE * np.einsum("bhd,bhdv->bhv", q[:, t], state)
    return y, state


@pytest.mark.parametrize("decays", DECAYS)
@pytest.mark.parametrize("tokens", [1, 7, 65])
def test_is_the_recurrence_in_float64(tokens, decays):
    inputs = example(tokens, decays=decays)
    for exact, found in zip(recurrence(inputs), kimi_delta_rule(*inputs, SCALE, True), strict=True):
        assert compare(exact, numbers(found)).max_abs < CLOSE


def test_a_prompt_in_two_pieces_equals_the_whole_and_no_state_is_changed_in_place():
    inputs = example(13)
    whole, end = kimi_delta_rule(*inputs, SCALE, True)
    state, pieces = inputs[5], []
    before = state.clone()
    for part in (slice(0, 5), slice(5, 13)):
        y, state = kimi_delta_rule(*(x[:, part] for x in inputs[:5]), state, SCALE, True)
        pieces.append(y)
    assert torch.equal(torch.cat(pieces, 1), whole)
    assert torch.equal(state, end)
    assert torch.equal(inputs[5], before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_transformers(dtype):
    inputs = example(7, dtype)
    asked = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    expected = recurrent_kimi_delta_attention(*inputs, **asked)
    for theirs, ours in zip(expected, kimi_delta_rule(*inputs, SCALE, True), strict=True):
        assert theirs.dtype == ours.dtype
        # A rounded result may be the next number.
        ulp = float(torch.finfo(ours.dtype).eps) if ours.dtype != torch.float32 else 0.0
        assert (np.abs(numbers(theirs) - numbers(ours)) <= CLOSE + ulp * np.abs(numbers(theirs))).all()


@pytest.mark.parametrize("target", ["portable", "onnxruntime"])
@pytest.mark.parametrize("l2_norm", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_body_in_onnx_runtime_equals_the_reference_at_any_length(target, dtype, l2_norm):
    model = body_model("KimiDeltaRule", {"scale": SCALE, "l2_norm": l2_norm}, dtype, SIZES, target=target)
    runtime = session(model)
    for tokens in (1, 7, 65):
        inputs = example(tokens, getattr(torch, dtype))
        if not l2_norm:
            inputs = (inputs[0], torch.nn.functional.normalize(inputs[1], dim=-1), *inputs[2:])
        feeds = dict(zip((i.name for i in model.graph.input), (x.numpy() for x in inputs), strict=True))
        y, after = kimi_delta_rule(*inputs, SCALE, l2_norm)
        found, found_after = runtime.run(None, feeds)
        assert found.dtype == np.dtype(dtype)
        ulp = 0.0 if dtype == "float32" else float(np.finfo(dtype).eps)
        assert (np.abs(found - numbers(y)) <= CLOSE + ulp * np.abs(numbers(y))).all()
        assert compare(numbers(after), found_after).max_abs < CLOSE


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="pip install tensorrt-rtx")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.engine
def test_rtx_builds_the_body(dtype, tmp_path):
    model = body_model("KimiDeltaRule", {"scale": SCALE, "l2_norm": True}, dtype, SIZES)
    assert rtx_build(model, {"B": (1, 2, 4), "T": (1, 63, 512)}, tmp_path) == ["built"]
