"""SinkAttention's launch plans: within every architecture's limits, all rows and keys taken, enough workspace."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native import beside_emulated

from llmexport.graphs.launches import SPLIT

SCALAR, DECODE, PREFILL = range(3)
FP32, FP16, BF16 = range(3)
THREADS, MAX_GRID_Y = 128, 65535
SHARED_BYTES = 99 * 1024  # that sm_86, sm_89 and sm_120 have; the others have more
MOST_SPLITS = 320
FLOAT_BYTES = 4
SMS = (1, 20, 58, 108, 132, 148, 1000)


@dataclass(frozen=True)
class Plan:
    path: int
    splits: int
    workspace: int
    shared: int
    blocks: int
    grid_y: int
    threads: int
    merged: int


Sizes = tuple[int, int, int, int, int, int]
Planned = Callable[..., Plan]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    built = beside_emulated("sink_attention.cpp")
    built.attention_workspace.restype = ctypes.c_int64
    return built


@pytest.fixture(scope="module")
def plan(library: ctypes.CDLL) -> Planned:
    def made(sizes: Sizes, window: int = 0, dtype: int = BF16, aligned: bool = True, processors: int = 132) -> Plan:
        out = (ctypes.c_int64 * 8)()
        library.attention_plan((ctypes.c_int64 * 6)(*sizes), window, dtype, ctypes.c_bool(aligned), processors, out)
        return Plan(*out)

    return made


@pytest.fixture(scope="module")
def workspace(library: ctypes.CDLL) -> Callable[[Sizes, int, int], int]:
    return lambda sizes, window, dtype: library.attention_workspace((ctypes.c_int64 * 6)(*sizes), window, dtype)


@st.composite
def nodes(draw: st.DrawFn) -> Sizes:
    groups, ratio = draw(st.integers(1, 16)), draw(st.integers(1, 80))
    tokens = draw(st.one_of(st.integers(1, 40), st.integers(1, 20000)))
    batch, keys = draw(st.integers(1, 256)), draw(st.integers(0, 200000))
    return batch, groups * ratio, groups, tokens, keys, draw(st.integers(1, 256))


windows = st.one_of(st.just(0), st.integers(1, 10000))
several = settings(max_examples=400, deadline=None, derandomize=True)


@several
@given(nodes(), windows, st.integers(0, 2), st.booleans(), st.sampled_from(SMS))
def test_every_row_and_key_is_taken_once(plan, sizes, window, dtype, aligned, processors):
    b, h, g, t, s, d = sizes
    p = plan(sizes, window, dtype, aligned, processors)
    rows = h // g * t
    assert (p.threads, p.grid_y) == (THREADS, p.splits)
    assert 1 <= p.splits <= min(MAX_GRID_Y, MOST_SPLITS)
    assert p.shared <= SHARED_BYTES
    if dtype == FP32 or not aligned or d % 8:
        assert (p.path, p.blocks, p.splits, p.workspace) == (SCALAR, b * h * t, 1, 0)
        return
    assert p.path == (DECODE if rows <= 32 else PREFILL)
    per_block = 16 if p.path == DECODE else 64 if d > 128 else 128
    assert p.blocks == b * g * -(-rows // per_block)
    split = p.splits > 1
    assert p.workspace == split * p.splits * b * h * t * (d + 1) * FLOAT_BYTES
    assert not split or p.merged == b * h * t
    seen = min(s, window + t - 1) if window else s
    assert p.splits == 1 or (p.splits - 1) * 128 < seen


@several
@given(nodes(), windows, st.sampled_from([FP16, BF16]), st.data())
def test_workspace_of_the_largest_sizes_is_enough_for_all(plan, workspace, sizes, window, dtype, data):
    b, h, g, t, s, d = sizes
    smaller = (data.draw(st.integers(1, b)), h, g, data.draw(st.integers(1, t)), data.draw(st.integers(0, s)), d)
    most = workspace(sizes, window, dtype)
    for processors in SMS:
        assert plan(smaller, window, dtype, True, processors).workspace <= most


def test_workspace_is_bounded(workspace):
    """By what the GPU can be filled with, not by the rows of the largest batch and prompt."""
    for d in (64, 128, 256):
        assert workspace((256, 64, 8, 32768, 131072, d), 0, BF16) <= 48 << 20


@pytest.mark.parametrize("window", [0, 128])
def test_workspace_is_no_more_than_the_most_that_is_used(plan, workspace, window):
    """Decode of a fixed shape on the largest GPU that is planned for."""
    sizes = (1, 64, 8, 1, 5000, 64)
    assert workspace(sizes, window, BF16) == plan(sizes, window, processors=160).workspace


def test_fp32_needs_no_workspace(workspace):
    assert workspace((1, 64, 8, 1, 8192, 64), 0, FP32) == 0


# B, H, G, T, S, D, window -> how many parts the keys are taken in, on the 132 SMs of an H200.
SPLITS = [
    ((1, 64, 8, 1, 8192, 64), 0, 33),
    ((8, 64, 8, 1, 8192, 64), 0, 5),
    ((64, 64, 8, 1, 8192, 64), 0, 1),
    # As graphs/launches.py counts.
    ((1, 64, 8, 1, 8192, 64), SPLIT, 1),
    ((1, 64, 8, 1, 8192, 64), SPLIT + 1, 2),
    ((1, 8, 1, 1, 8192, 256), 0, 64),
    ((1, 8, 1, 1, 200, 256), 0, 2),
    ((1, 8, 1, 4096, 4096, 256), 0, 1),
    ((1, 8, 1, 64, 8192, 256), 0, 32),
]


@pytest.mark.parametrize(("sizes", "window", "splits"), SPLITS, ids=str)
def test_keys_are_split_to_fill_the_gpu(plan, sizes, window, splits):
    assert plan(sizes, window).splits == splits
