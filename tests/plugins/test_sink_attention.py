"""SinkAttention against float64, GPT-OSS and Gemma 2 of transformers, and ONNX Runtime's GroupQueryAttention."""

import importlib.util
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example as example_of
from hypothesis import given, settings
from hypothesis import strategies as st
from one_node import body_model, rtx_build, run_operator, session
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss

from llmexport.plugins.sink_attention import sink_attention

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FP32 = float(np.finfo(np.float32).eps)
HIDDEN = 3e4  # in keys and values that no query may see: large, and finite in fp16


@dataclass(frozen=True)
class Case:
    """Sizes, and of each row of the batch the first key that is there and the one after the last."""

    tokens: int
    start: tuple[int, ...]
    length: tuple[int, ...]
    keys: int = 9
    heads: int = 4
    groups: int = 2
    size: int = 10
    window: int = 0
    softcap: float = 0.0
    sinks: bool = True

    @property
    def scale(self) -> float:
        return self.size**-0.5


CASES = {
    "prompt": Case(9, (0, 0), (9, 9)),
    "prompt, padded left": Case(9, (0, 4), (9, 9)),
    "one token": Case(1, (0, 0), (9, 9)),
    "one token, preallocated": Case(1, (0, 0), (4, 7)),
    "tokens after a past": Case(3, (0, 0), (9, 9)),
    "tokens after a past, padded left": Case(3, (5, 2), (9, 9)),
    "preallocated": Case(3, (0, 0), (5, 8)),
    "preallocated, padded left": Case(3, (1, 2), (5, 8)),
    "window shorter than the past": Case(3, (0, 0), (9, 9), window=4),
    "window longer than the past": Case(3, (0, 0), (9, 9), window=30),
    "window of one": Case(3, (0, 0), (9, 9), window=1),
    "window, preallocated, padded left": Case(3, (4, 2), (6, 8), window=3),
    "one head each": Case(3, (0, 1), (5, 8), groups=4),
    "one group": Case(3, (0, 1), (5, 8), groups=1),
    "soft cap": Case(3, (0, 1), (5, 8), softcap=2.0),
    "no sinks": Case(3, (0, 1), (5, 8), sinks=False),
    "no sinks, soft cap, window": Case(3, (0, 1), (5, 8), sinks=False, softcap=2.0, window=2),
    "rows that see nothing": Case(4, (3, 0), (4, 2)),
    "rows that see nothing, no sinks": Case(4, (3, 0), (4, 2), sinks=False),
    "an empty row": Case(1, (0, 2), (0, 2)),
    "130 keys": Case(63, (0, 40), (130, 101), keys=130, window=50),
}

Inputs = tuple[torch.Tensor | None, ...]


def example(case: Case, dtype: torch.dtype = torch.float32) -> Inputs:
    """q, k, v, start, length, sinks; what is not there of k and v is HIDDEN."""
    seed = torch.Generator().manual_seed(case.keys + case.tokens)
    batch = len(case.start)
    q = 2 * torch.randn(batch, case.heads, case.tokens, case.size, generator=seed)
    k, v = (torch.randn(batch, case.groups, case.keys, case.size, generator=seed) for _ in range(2))
    for b, (first, end) in enumerate(zip(case.start, case.length, strict=True)):
        for x, sign in ((k, 1), (v, -1)):
            x[b, :, :first], x[b, :, end:] = sign * HIDDEN, sign * HIDDEN
    sinks = torch.randn(case.heads, generator=seed) if case.sinks else None
    start, length = (torch.tensor(x, dtype=torch.int32) for x in (case.start, case.length))
    return *(x.to(dtype) for x in (q, k, v)), start, length, sinks if sinks is None else sinks.to(dtype)


def attend(case: Case, inputs: Inputs) -> torch.Tensor:
    return sink_attention(*inputs, case.scale, case.softcap, case.window)


def numbers(value: torch.Tensor) -> np.ndarray:
    return value.double().numpy()


def visible(case: Case, row: int, token: int) -> range:
    """The keys that a query sees."""
    here = case.length[row] - case.tokens + token
    first = max(case.start[row], here - case.window + 1 if case.window else 0)
    return range(first, max(first, here + 1))


def exact(case: Case, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """y [B, T, H, D] in float64, query by query, and how far fp32 may take it: the rounding of a logit of D products
    moves its weight by that much of itself, twice as they are divided by their sum."""
    q, k, v = (numbers(x) for x in inputs[:3])
    y = np.zeros_like(q.swapaxes(1, 2))
    bound = np.zeros((*y.shape[:3], 1))
    for b, t, h in np.ndindex(*y.shape[:3]):
        keys = visible(case, b, t)
        if not keys:
            continue
        group = h * case.groups // case.heads
        key, value = k[b, group, keys], v[b, group, keys]
        logits = case.scale * key @ q[b, h, t]
        rounding = FP32 * (case.size + 2) * (case.scale * np.abs(key) @ np.abs(q[b, h, t])).max()
        if case.softcap:
            logits = case.softcap * np.tanh(logits / case.softcap)
            rounding += 4 * FP32 * case.softcap
        sink = [] if inputs[5] is None else [numbers(inputs[5])[h]]
        weights = np.exp(np.concatenate((logits, sink)) - logits.max())
        y[b, t, h] = (weights / weights.sum())[: len(keys)] @ value
        bound[b, t, h] = (2 * rounding + (2 * len(keys) + 8) * FP32) * np.abs(value).max()
    return y, bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_is_the_formula_in_float64(case, dtype):
    inputs = example(case, dtype)
    y, bound = exact(case, inputs)
    found = attend(case, inputs)
    assert found.dtype == dtype
    assert (np.abs(numbers(found) - y) <= bound + torch.finfo(dtype).eps / 2 * np.abs(y)).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 9),
    past=st.integers(0, 9),
    room=st.integers(0, 5),
    start=st.integers(0, 9),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 3)]),
    size=st.integers(1, 20),
    window=st.integers(0, 12),
    softcap=st.sampled_from([0.0, 1.5, 30.0]),
    sinks=st.booleans(),
)
def test_is_the_formula_at_any_size(tokens, past, room, start, heads, size, window, softcap, sinks):
    length = past + tokens
    case = Case(
        tokens,
        (0, min(start, length)),
        (length, length),
        length + room,
        *heads,
        size=size,
        window=window,
        softcap=softcap,
        sinks=sinks,
    )
    inputs = example(case)
    y, bound = exact(case, inputs)
    assert (np.abs(numbers(attend(case, inputs)) - y) <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_all_is_in_fp32_and_rounded_once(case, dtype):
    inputs = example(case, dtype)
    wide = [x if x is None or x.dtype == torch.int32 else x.float() for x in inputs]
    assert torch.equal(attend(case, inputs), attend(case, wide).to(dtype))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_is_not_there_changes_no_bit(case):
    q, k, v, *rest = example(case)
    cleared = [torch.where(x.abs() == HIDDEN, 0.0, x) for x in (k, v)]
    assert torch.equal(attend(case, (q, k, v, *rest)), attend(case, (q, *cleared, *rest)))


@pytest.mark.parametrize("case", [c for n, c in CASES.items() if "nothing" in n or "empty" in n])
def test_a_query_that_sees_nothing_gives_zeros(case):
    y = attend(case, example(case))
    blind = [(b, t) for b in range(2) for t in range(case.tokens) if not visible(case, b, t)]
    assert blind
    assert all((y[b, t] == 0).all() for b, t in blind)


@pytest.mark.parametrize("case", [c for n, c in CASES.items() if "nothing" in n or "empty" in n])
def test_a_sink_of_minus_infinity_is_none(case):
    *inputs, _ = example(case)
    without = sink_attention(*inputs, None, case.scale, 0.0, 0)
    assert torch.equal(attend(case, (*inputs, torch.full((4,), -torch.inf))), without)


def test_a_sink_takes_weight_away_and_gives_nothing():
    case = CASES["prompt"]
    *inputs, _ = example(case)
    without = sink_attention(*inputs, None, case.scale, 0.0, 0)
    low, high = (attend(case, (*inputs, torch.full((4,), x))) for x in (-1e4, 1e4))
    assert torch.equal(low, without)
    assert (high == 0).all()


def test_large_logits_give_no_nan():
    case = CASES["tokens after a past"]
    q, *rest = example(case)
    assert attend(case, (1e6 * q, *rest)).isfinite().all()


def test_tokens_after_a_past_are_the_end_of_the_whole():
    case = Case(9, (0, 2), (9, 9), window=4, softcap=5.0)
    q, *rest = example(case)
    whole, bound = attend(case, (q, *rest)), exact(case, (q, *rest))[1]
    for tokens in (1, 3):
        found = attend(replace(case, tokens=tokens), (q[:, :, -tokens:], *rest))
        assert (np.abs(numbers(found) - numbers(whole)[:, -tokens:]) <= 2 * bound[:, -tokens:]).all()


def mask(case: Case) -> torch.Tensor:
    """What transformers adds to the logits of a grown cache, from its own definition of a window."""
    sees = sliding_window_causal_mask_function(case.window) if case.window else causal_mask_function
    query = torch.arange(case.keys - case.tokens, case.keys)[None, :, None]
    key, start = torch.arange(case.keys)[None, None, :], torch.tensor(case.start)[:, None, None]
    there = torch.as_tensor(sees(0, 0, query, key)) & (key >= start)
    return torch.where(there, 0.0, torch.finfo(torch.float32).min)[:, None]


GROWN = {n: c for n, c in CASES.items() if set(c.length) == {c.keys} and n != "prompt, padded left"}


@pytest.mark.parametrize("case", [c for c in GROWN.values() if c.sinks], ids=[n for n, c in GROWN.items() if c.sinks])
def test_is_gpt_oss(case):
    inputs = example(case)
    q, k, v, _, _, sinks = inputs
    module = SimpleNamespace(num_key_value_groups=case.heads // case.groups, sinks=sinks, training=False)
    expected, _ = modeling_gpt_oss.eager_attention_forward(module, q, k, v, mask(case), case.scale)
    bound = 2 * exact(case, inputs)[1]
    assert (np.abs(numbers(expected) - numbers(attend(case, inputs))) <= bound).all()


@pytest.mark.parametrize("softcap", [0.0, 2.0, 50.0])
@pytest.mark.parametrize("case", GROWN.values(), ids=GROWN)
def test_without_sinks_is_gemma_2(case, softcap):
    case = replace(case, sinks=False, softcap=softcap)
    inputs = example(case)
    module = SimpleNamespace(num_key_value_groups=case.heads // case.groups, training=False)
    expected, _ = modeling_gemma2.eager_attention_forward(
        module, *inputs[:3], mask(case), scaling=case.scale, softcap=softcap or None
    )
    bound = 2 * exact(case, inputs)[1]
    assert (np.abs(numbers(expected) - numbers(attend(case, inputs))) <= bound).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    tokens=st.sampled_from([1, 1, 2, 7, 20]),
    past=st.sampled_from([(0, 0), (3, 8), (0, 40), (33, 17)]),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 3)]),
    size=st.sampled_from([8, 16, 32]),
    window=st.integers(0, 50),
    softcap=st.sampled_from([0.0, 2.0, 30.0]),
    sinks=st.booleans(),
)
@example_of(tokens=1, past=(3, 8), heads=(4, 2), size=16, window=4, softcap=2.0, sinks=True)
def test_equals_group_query_attention_at_any_size(tokens, past, heads, size, window, softcap, sinks):
    # Several tokens after a past it takes of one row alone.
    length = tuple(p + tokens for p in (past if tokens == 1 or past == (0, 0) else past[1:]))
    case = Case(tokens, (0,) * len(length), length, max(length), *heads, size, window, softcap, sinks)
    q, k, v, start, end, sink = example(case)
    past = case.keys - tokens

    def rows(x: torch.Tensor, first: list[int]) -> torch.Tensor:
        return torch.stack([y[:, f : f + tokens] for y, f in zip(x, first, strict=True)]).transpose(1, 2).flatten(2)

    new = [n - tokens for n in length]
    y, keys, values = run_operator(
        "GroupQueryAttention",
        "com.microsoft",
        1,
        [
            q.transpose(1, 2).flatten(2).numpy(),
            rows(k, new).numpy(),
            rows(v, new).numpy(),
            k[:, :, :past].numpy(),
            v[:, :, :past].numpy(),
            end.numpy() - 1,
            np.array(case.keys, np.int32),
            None,
            None,
            None,
            None,
            None if sink is None else sink.numpy(),
        ],
        3,
        num_heads=case.heads,
        kv_num_heads=case.groups,
        scale=case.scale,
        softcap=softcap,
        local_window_size=window or -1,
    )
    inputs = (q, torch.from_numpy(keys), torch.from_numpy(values), start, end, sink)
    found = numbers(attend(case, inputs).flatten(2))
    bound = np.abs(exact(case, inputs)[1]).max()
    assert (np.abs(found - y) <= 2 * bound).all()


@pytest.mark.parametrize(
    ("groups", "sinks", "window", "softcap"),
    [(2, True, 0, 0.0), (2, False, 4, 2.0), (4, True, 4, 2.0), (4, False, 0, 0.0)],
)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_body_in_onnx_runtime_equals_the_reference_at_other_sizes(dtype, groups, sinks, window, softcap):
    attributes = {"scale": 0.3, "softcap": softcap, "window": window}
    sizes = {"H": 4, "G": groups, "D": 10}
    model = body_model("SinkAttention", attributes, dtype, sizes, without=int(not sinks))
    runtime = session(model)
    for case in CASES.values():
        case = replace(case, groups=groups, sinks=sinks, window=window, softcap=softcap)
        *inputs, sink = example(case, getattr(torch, dtype))
        if sink is not None:
            sink[0] = -torch.inf
        inputs = (*inputs, sink)
        y = numbers(sink_attention(*inputs, **attributes))
        given = [x.numpy() for x in inputs if x is not None]
        (found,) = runtime.run(None, dict(zip((i.name for i in model.graph.input), given, strict=True)))
        assert found.dtype == np.dtype(dtype)
        # An fp16 result may round to its next number.
        ulp = 0.0 if dtype == "float32" else float(np.finfo(dtype).eps)
        assert (np.abs(found - y) <= 2 * exact(case, inputs)[1] + ulp * np.abs(y)).all()


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="pip install tensorrt-rtx")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.engine
def test_rtx_builds_the_body(dtype, tmp_path):
    attributes = {"scale": 0.3, "softcap": 2.0, "window": 4}
    model = body_model("SinkAttention", attributes, dtype, {"H": 4, "G": 2, "D": 64})
    assert rtx_build(model, {"B": (1, 2, 4), "T": (1, 63, 512), "S": (1, 130, 600)}, tmp_path) == ["built"]
