"""GatedDeltaRule against a float64 recurrence, transformers, ONNX's and ONNX Runtime's LinearAttention."""

import importlib.util

import numpy as np
import onnx
import pytest
import torch
from hypothesis import example as example_of
from hypothesis import given, settings
from hypothesis import strategies as st
from one_node import body_model, rtx_build, run_operator, session
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from llmexport.plugins.gated_delta_rule import gated_delta_rule
from llmexport.validate.compare import compare

TOKENS = [1, 7, 63, 64, 65, 130]
SIZES = {"G": 2, "H": 6, "D": 16, "V": 12}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SCALE = SIZES["D"] ** -0.5
# Of values of order one, in fp32: the contract of the op.
CLOSE = 1e-5
KEYS = ["random", "equal", "near", "opposite", "walking"]
DECAYS = ["none", "weak", "strong", "mixed", "early", "total"]
BETAS = ["one", "any"]

Inputs = tuple[torch.Tensor, ...]


def example(
    tokens: int,
    dtype: torch.dtype = torch.float32,
    sizes: dict[str, int] = SIZES,
    keys: str = "random",
    decays: str = "mixed",
    betas: str = "any",
) -> Inputs:
    """q, k, v, g, beta and a state that is not zero, B = 2."""
    seed = torch.Generator().manual_seed(tokens)
    g, h, d, v = sizes.values()

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(2, *shape, generator=seed)

    k = randn(tokens, g, d)
    k = {
        "random": k,
        "equal": k[:, :1].expand_as(k).clone(),
        "near": k[:, :1] + 1e-2 * k,
        "opposite": k[:, :1] * k[..., :1].sign(),
        "walking": k.cumsum(1),
    }[keys]
    chance = torch.rand(2, tokens, h, generator=seed)
    decay = {
        "none": torch.zeros_like(chance),
        "weak": -1e-4 * chance,
        "strong": -20 * chance,
        "mixed": torch.where(chance < 0.2, -20.0, -1e-2 * chance),
        # Running sums of g would round the small ones that come late to half a unit of 600.
        "early": torch.where(torch.arange(tokens)[:, None] % 64 < 30, -20.0, -1e-2 * chance),
        "total": torch.where(chance < 0.1, -torch.inf, -0.1),
    }[decays]
    beta = torch.ones_like(chance) if betas == "one" else torch.rand(2, tokens, h, generator=seed)
    q, values, state = randn(tokens, g, d), randn(tokens, h, v), randn(h, d, v)
    return q.to(dtype), k.to(dtype), values.to(dtype), decay, beta.to(dtype), state


def numbers(value: torch.Tensor) -> np.ndarray:
    return value.double().numpy()


def recurrence(inputs: Inputs, scale: float = SCALE, l2_norm: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """y and the next state in float64, token by token."""
    q, k, v, g, beta, state = map(numbers, inputs)
    if l2_norm:
        q, k = (x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    q, k = (x.repeat(v.shape[2] // x.shape[2], 2) for x in (q, k))
    y = np.zeros_like(v)
    for t in range(v.shape[1]):
        state = np.exp(g[:, t, :, None, None]) * state
        error = beta[:, t, :, None] * (v[:, t] - np.einsum("bhd,bhdv->bhv", k[:, t], state))
        state = state + np.einsum("bhd,bhv->bhdv", k[:, t], error)
        y[:, t] = scale * np.einsum("bhd,bhdv->bhv", q[:, t], state)
    return y, state


def normed(inputs: Inputs) -> Inputs:
    """The same with q and k of length one, as operators without l2_norm want them."""
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in inputs[:2])
    return q, k, *inputs[2:]


def largest_error(exact: tuple[np.ndarray, np.ndarray], found: tuple[torch.Tensor, ...]) -> float:
    return max(compare(e, numbers(f)).max_abs for e, f in zip(exact, found, strict=True))


@pytest.mark.parametrize("decays", DECAYS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_is_the_recurrence_in_float64(tokens, decays):
    inputs = example(tokens, decays=decays)
    assert largest_error(recurrence(inputs), gated_delta_rule(*inputs, SCALE, True)) < CLOSE


@pytest.mark.parametrize("decays", DECAYS)
@pytest.mark.parametrize("keys", KEYS)
def test_is_the_recurrence_whatever_the_keys(keys, decays):
    inputs = example(130, keys=keys, decays=decays, betas="one")
    assert largest_error(recurrence(inputs), gated_delta_rule(*inputs, SCALE, True)) < CLOSE


def test_is_the_recurrence_over_a_long_prompt_of_equal_keys_that_nothing_decays():
    # Powers of the chunk's triangular matrix reach binomials of its size here; its inverse holds -1, 0 and 1.
    inputs = example(1000, keys="equal", decays="none", betas="one")
    assert largest_error(recurrence(inputs), gated_delta_rule(*inputs, SCALE, True)) < CLOSE


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    tokens=st.integers(1, 150),
    keys=st.sampled_from(KEYS),
    decays=st.sampled_from(DECAYS),
    betas=st.sampled_from(BETAS),
    l2_norm=st.booleans(),
)
def test_is_the_recurrence_at_any_size(sizes, tokens, keys, decays, betas, l2_norm):
    g, shared, d, v = sizes
    inputs = example(tokens, torch.float32, {"G": g, "H": g * shared, "D": d, "V": v}, keys, decays, betas)
    inputs = inputs if l2_norm else normed(inputs)
    found = gated_delta_rule(*inputs, 0.7, l2_norm)
    assert largest_error(recurrence(inputs, 0.7, l2_norm), found) < CLOSE


@pytest.mark.parametrize("published", [torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule])
@pytest.mark.parametrize("tokens", TOKENS)
def test_is_transformers_with_and_without_its_norm(tokens, published):
    for l2_norm in (True, False):
        q, k, v, g, beta, state = example(tokens) if l2_norm else normed(example(tokens))
        y, after = published(
            q,
            k,
            v,
            g=g,
            beta=beta,
            initial_state=state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=l2_norm,
        )
        found = gated_delta_rule(q, k, v, g, beta, state, SCALE, l2_norm)
        # Theirs takes differences of running sums of g: half a unit of fp32 at 64 times 20 is 6e-5.
        close = 1e-4 if published is torch_chunk_gated_delta_rule else CLOSE
        assert largest_error((numbers(y), numbers(after)), found) < close


@pytest.mark.parametrize(("domain", "opset"), [("", 27), ("com.microsoft", 1)], ids=["onnx", "ONNX Runtime"])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    tokens=st.integers(1, 150),
    scale=st.sampled_from([SCALE, 0.7]),
)
@example_of(sizes=(2, 3, 16, 12), tokens=130, scale=SCALE)
def test_equals_linear_attention_at_any_size(domain, opset, sizes, tokens, scale):
    if not domain and not onnx.defs.has("LinearAttention"):
        pytest.skip("this onnx is older than opset 27, which has LinearAttention")
    groups, shared, d, values = sizes
    inputs = normed(example(tokens, sizes={"G": groups, "H": groups * shared, "D": d, "V": values}))
    q, k, v, g, beta, state = inputs
    q, k = (x.repeat_interleave(shared, 2) for x in (q, k))
    packed = [x.flatten(2).numpy() for x in (q, k, v)]
    y, after = run_operator(
        "LinearAttention",
        domain,
        opset,
        [*packed, state.numpy(), g.numpy(), beta.numpy()],
        2,
        update_rule="gated_delta",
        q_num_heads=groups * shared,
        kv_num_heads=groups * shared,
        scale=scale,
    )
    assert largest_error((y.reshape(v.shape), after), gated_delta_rule(*inputs, scale, False)) < CLOSE


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_all_is_in_fp32_and_rounded_once(tokens, dtype):
    inputs = example(tokens, dtype)
    y, after = gated_delta_rule(*(x.float() for x in inputs), SCALE, True)
    found, found_after = gated_delta_rule(*inputs, SCALE, True)
    assert found.dtype == dtype
    assert torch.equal(found, y.to(dtype))
    assert torch.equal(found_after, after)


@pytest.mark.parametrize("cut", [1, 7, 64, 129])
def test_a_state_carried_over_a_cut_gives_the_whole(cut):
    *sequences, state = example(130, decays="weak")
    whole = gated_delta_rule(*sequences, state, SCALE, True)
    first, state = gated_delta_rule(*(x[:, :cut] for x in sequences), state, SCALE, True)
    second, state = gated_delta_rule(*(x[:, cut:] for x in sequences), state, SCALE, True)
    assert largest_error((numbers(torch.cat((first, second), 1)), numbers(state)), whole) < CLOSE


def test_steps_of_one_token_give_the_whole():
    *sequences, state = example(65)
    whole = gated_delta_rule(*sequences, state, SCALE, True)
    ys = []
    for t in range(65):
        y, state = gated_delta_rule(*(x[:, t : t + 1] for x in sequences), state, SCALE, True)
        ys.append(y)
    assert largest_error((numbers(torch.cat(ys, 1)), numbers(state)), whole) < CLOSE


def test_consecutive_heads_share_a_key():
    q, k, v, g, beta, state = example(7)
    shared = SIZES["H"] // SIZES["G"]
    own = [x.repeat_interleave(shared, 2) for x in (q, k)]
    found = gated_delta_rule(q, k, v, g, beta, state, SCALE, True)
    assert largest_error(tuple(map(numbers, gated_delta_rule(*own, v, g, beta, state, SCALE, True))), found) < CLOSE


def test_a_state_is_not_changed_in_place():
    inputs = example(7)
    before = inputs[5].clone()
    gated_delta_rule(*inputs, SCALE, True)
    assert torch.equal(inputs[5], before)


@pytest.mark.parametrize("target", ["portable", "onnxruntime"])
@pytest.mark.parametrize("l2_norm", [True, False])
@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_body_in_onnx_runtime_equals_the_reference_at_any_length(target, dtype, heads, l2_norm):
    sizes = {**SIZES, "H": heads}
    model = body_model("GatedDeltaRule", {"scale": SCALE, "l2_norm": l2_norm}, dtype, sizes, target=target)
    runtime = session(model)
    for tokens in (*TOKENS, 32, 33):
        inputs = example(tokens, getattr(torch, dtype), sizes)
        inputs = inputs if l2_norm else normed(inputs)
        y, after = gated_delta_rule(*inputs, SCALE, l2_norm)
        feeds = dict(zip((i.name for i in model.graph.input), (x.numpy() for x in inputs), strict=True))
        found, found_after = runtime.run(None, feeds)
        assert found.dtype == np.dtype(dtype)
        # An fp16 result may round to its next number.
        ulp = 0.0 if dtype == "float32" else float(np.finfo(dtype).eps)
        assert (np.abs(found - numbers(y)) <= CLOSE + ulp * np.abs(numbers(y))).all()
        assert compare(numbers(after), found_after).max_abs < CLOSE


@pytest.mark.parametrize("target", ["portable", "onnxruntime"])
@pytest.mark.parametrize("decays", DECAYS)
@pytest.mark.parametrize("keys", KEYS)
def test_body_in_onnx_runtime_is_the_recurrence_whatever_the_keys(target, keys, decays):
    model = body_model("GatedDeltaRule", {"scale": SCALE, "l2_norm": True}, "float32", SIZES, target=target)
    runtime = session(model)
    for tokens in (7, 65, 130):
        inputs = example(tokens, keys=keys, decays=decays, betas="one")
        feeds = dict(zip((i.name for i in model.graph.input), (x.numpy() for x in inputs), strict=True))
        for exact, found in zip(recurrence(inputs), runtime.run(None, feeds), strict=True):
            assert compare(exact, found).max_abs < CLOSE


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="pip install tensorrt-rtx")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.engine
def test_rtx_builds_the_body(dtype, tmp_path):
    model = body_model("GatedDeltaRule", {"scale": SCALE, "l2_norm": True}, dtype, SIZES)
    assert rtx_build(model, {"B": (1, 2, 4), "T": (1, 63, 512)}, tmp_path) == ["built"]
