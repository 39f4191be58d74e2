"""MoeExperts' launch plans and workspace: within every architecture's limits, enough for any routing, wasting none."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native import beside_emulated, emulated_library
from plugin_host import DTYPES, lay_out
from plugin_memory import CpuMemory

from llmexport.plugins.host import Library

FP32, FP16, BF16 = range(3)
MXFP4, MXFP8, NVFP4, FP8, UINT4, UINT8, INT8 = range(3, 10)
ITEM_SIZES = (4, 2, 2)
MAX_GRID, MAX_THREADS = 2**31 - 1, 1024
# Static and dynamic, that a block of sm_86, sm_89 and sm_120 may have; and what CUDA keeps of each block.
SHARED_BYTES, SHARED_KEPT = 99 * 1024, 1024
# SMs, and what a block may have: sm_90, sm_80 and sm_120.
H100, A100, RTX5090 = (132, 227 * 1024), (108, 163 * 1024), (170, SHARED_BYTES)
# Pairs, their rows and a share of the largest tile; the experts' first rows and tiles, and the sums of warps.
PROJECTION_STATIC, SORT_STATIC = 2 * 128 * 4 + 12, 2 * 521 * 4 + 32 * 8
UNSORTED_PAIRS, FEW_ROWS, TILE_BYTES = 32, 16, 16
ALIGNMENT = 16

Sizes = tuple[int, int, int, int, int]  # tokens, slots, experts, hidden, intermediate


@dataclass(frozen=True)
class Launch:
    blocks: int
    threads: int
    shared: int


@dataclass(frozen=True)
class Plan:
    on_tensor_cores: bool
    is_sorted: bool
    tile_rows: int
    row_tiles: int
    up_tiles: int
    width: int
    down_tiles: int
    row_blocks: int
    scale: Launch
    sort: Launch
    up: Launch
    down: Launch
    combine: Launch


Planned = Callable[..., Plan]
Parted = Callable[[Sizes, int], list[int]]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return beside_emulated("moe_experts.cpp")


@pytest.fixture(scope="module")
def plan(library: ctypes.CDLL) -> Planned:
    def made(
        sizes: Sizes,
        dtype: int = BF16,
        stored: int = BF16,
        aligned: bool = True,
        device: tuple[int, int] = H100,
        group: int = 32,
        factors: bool = False,
    ) -> Plan:
        out = (ctypes.c_int64 * 23)()
        # Before these forms of weights the library has that of an op without any; what is packed are bytes.
        form = (min(1 + stored, 4), max(stored - 2, 0), group, ctypes.c_bool(factors))
        library.moe_plan((ctypes.c_int64 * 7)(*sizes, *device), dtype, *form, ctypes.c_bool(aligned), out)
        launches = [Launch(*out[i : i + 3]) for i in range(8, 23, 3)]
        return Plan(bool(out[0]), bool(out[1]), *out[2:8], *launches)

    return made


@pytest.fixture(scope="module")
def workspace(library: ctypes.CDLL) -> Parted:
    def parts(sizes: Sizes, dtype: int) -> list[int]:
        out = (ctypes.c_int64 * 5)()
        library.moe_workspace((ctypes.c_int64 * 5)(*sizes), dtype, out)
        return list(out)

    return parts


several = settings(max_examples=200, deadline=None, derandomize=True)
sizes = st.tuples(
    st.integers(1, 5000), st.integers(1, 16), st.integers(1, 512), st.integers(1, 1200), st.integers(1, 1200)
).map(lambda s: (*s[:3], s[3] * (8 if s[3] % 2 else 1), s[4] * (8 if s[4] % 2 else 1)))
kinds = st.integers(0, 2)


@several
@given(sizes, kinds, st.integers(0, INT8), st.booleans())
def test_every_launch_is_within_the_limits_and_takes_all(plan: Planned, sizes, dtype, stored, aligned):
    tokens, slots, _, hidden, _ = sizes
    p = plan(sizes, dtype, stored, aligned)
    for launch in (p.scale, p.sort, p.up, p.down, p.combine):
        assert 0 < launch.blocks <= MAX_GRID
        assert 0 < launch.threads <= MAX_THREADS
    assert max(p.up.shared, p.down.shared) + PROJECTION_STATIC <= SHARED_BYTES
    assert p.sort.shared + SORT_STATIC <= SHARED_BYTES
    for launch, tiles in ((p.up, p.up_tiles), (p.down, p.down_tiles)):
        shares = p.row_tiles * tiles
        all_at_once = p.tile_rows == FEW_ROWS or stored > MXFP4
        assert launch.blocks == (shares if all_at_once else min(shares, 2 * H100[0]))
    per_block = p.combine.threads * p.width
    assert p.row_blocks * per_block >= hidden > (p.row_blocks - 1) * per_block
    assert (p.scale.blocks, p.combine.blocks) == (tokens * slots * p.row_blocks, tokens * p.row_blocks)
    assert p.is_sorted == (tokens * slots > UNSORTED_PAIRS)


@several
@given(sizes, kinds, st.integers(0, 3), st.booleans())
def test_tensor_cores_take_16_bits_in_whole_vectors(plan: Planned, sizes, dtype, stored, aligned):
    tokens, slots, experts, hidden, intermediate = sizes
    p = plan(sizes, dtype, stored, aligned)
    whole = aligned and hidden % 8 == 0 and intermediate % 8 == 0
    assert p.width == (16 // ITEM_SIZES[dtype] if whole else 1)
    if stored != MXFP4:
        assert p.on_tensor_cores == (whole and dtype != FP32 and stored != FP32)
    elif p.on_tensor_cores:
        assert whole
        assert dtype != FP32
    if p.on_tensor_cores:
        assert (p.tile_rows == FEW_ROWS) == (tokens * slots <= FEW_ROWS * experts)
    else:
        assert p.tile_rows == FEW_ROWS


@several
@given(
    st.tuples(st.integers(1, 300), st.just(4), st.just(32), *[st.integers(1, 80).map(lambda n: 8 * n)] * 2),
    kinds,
    st.integers(MXFP4, INT8),
    st.sampled_from([1, 8, 16, 24, 32, 48, 128, 10**6]),
    st.booleans(),
)
def test_tensor_cores_take_packed_weights_in_whole_copies_and_groups(
    plan: Planned, sizes, dtype, stored, group, factors
):
    depths, half = sizes[3:], stored in (MXFP4, NVFP4, UINT4)
    whole = all(n % (32 if half else 16) == 0 for n in depths)
    grouped = all(group % (16 if half else 32) == 0 or group >= n for n in depths)
    assert plan(sizes, dtype, stored, group=group, factors=factors).on_tensor_cores == (
        dtype != FP32 and whole and grouped
    )


@several
@given(sizes, kinds, st.booleans(), st.data())
def test_row_tiles_suffice_for_any_routing_and_are_needed_for_one(plan: Planned, sizes, dtype, aligned, data):
    tokens, slots, experts, _, _ = sizes
    p, pairs = plan(sizes, dtype, dtype, aligned), tokens * slots

    def tiles(counts: list[int]) -> int:
        assert sum(counts) == pairs
        return sum(math.ceil(count / p.tile_rows) for count in counts)

    cuts = sorted(data.draw(st.lists(st.integers(0, pairs), min_size=experts - 1, max_size=experts - 1)))
    assert tiles([b - a for a, b in zip([0, *cuts], [*cuts, pairs], strict=True)]) <= p.row_tiles
    chosen = min(experts, pairs)
    assert tiles([1] * (chosen - 1) + [pairs - chosen + 1]) == p.row_tiles


@several
@given(sizes, kinds)
def test_workspace_has_room_for_every_part(plan: Planned, workspace: Parted, sizes, dtype):
    tokens, slots, experts, hidden, intermediate = sizes
    gated, outputs, order, tiles, end = workspace(sizes, dtype)
    pairs = tokens * slots
    assert gated == 0
    assert all(part % ALIGNMENT == 0 for part in (outputs, order, tiles))
    assert outputs - gated >= pairs * intermediate * ITEM_SIZES[dtype]
    assert order - outputs >= pairs * hidden * ITEM_SIZES[dtype]
    for aligned in (False, True):
        p = plan(sizes, dtype, dtype, aligned)
        assert tiles - order >= pairs * 4 * p.is_sorted
        assert end - tiles >= p.row_tiles * TILE_BYTES * p.is_sorted
    whole = pairs * (hidden + intermediate) * ITEM_SIZES[dtype] + (pairs * 4 if pairs > UNSORTED_PAIRS else 0)
    assert end - whole <= 3 * ALIGNMENT + (min(pairs, experts) + pairs / FEW_ROWS) * TILE_BYTES


@several
@given(sizes, kinds, st.integers(1, 5000))
def test_workspace_of_more_tokens_has_room_for_fewer(workspace: Parted, sizes, dtype, more):
    assert workspace((sizes[0] + more, *sizes[1:]), dtype)[-1] >= workspace(sizes, dtype)[-1]


# tokens, slots, experts, hidden, intermediate of Qwen3.5-35B-A3B, gpt-oss-20b and Llama-4-Scout.
MODELS = {"qwen": (8, 256, 2048, 512), "gpt-oss": (4, 32, 2880, 2880), "scout": (1, 16, 5120, 8192)}


@pytest.mark.parametrize("stored", [BF16, MXFP4, NVFP4, FP8])
@pytest.mark.parametrize("tokens", [1, 8, 64, 512, 4096])
@pytest.mark.parametrize("model", MODELS)
def test_real_models_run_on_tensor_cores_two_blocks_or_more_to_an_sm(plan: Planned, model, tokens, stored):
    p = plan((tokens, *MODELS[model]), BF16, stored)
    assert p.on_tensor_cores
    assert (p.tile_rows == FEW_ROWS) == (tokens <= (512 if model == "qwen" else 64))
    beside = PROJECTION_STATIC + SHARED_KEPT
    assert 2 * (max(p.up.shared, p.down.shared) + beside) <= H100[1] + SHARED_KEPT
    if stored > MXFP4:
        assert 2 * (max(p.up.shared, p.down.shared) + beside) <= A100[1] + SHARED_KEPT


def test_four_blocks_of_decode_of_mxfp4_share_an_sm(plan: Planned):
    """As many as have registers: another warp works where one waits."""
    p = plan((64, *MODELS["gpt-oss"]), BF16, MXFP4)
    a_block = max(p.up.shared, p.down.shared) + PROJECTION_STATIC + SHARED_KEPT
    assert 4 * a_block <= H100[1] + SHARED_KEPT


@pytest.mark.parametrize("hidden", [32, 96, 2880])
def test_decode_of_mxfp4_has_each_scale_once_in_shared_memory(plan: Planned, hidden):
    """A tile's 64 columns of them, and those that the last column's lanes read beyond the depth."""
    of_256 = (256 // 32) * 65
    all_but_scales = plan((1, 4, 32, 256, 2880), BF16, MXFP4).up.shared - of_256
    assert plan((1, 4, 32, hidden, 2880), BF16, MXFP4).up.shared - all_but_scales == hidden // 32 * 64 + 8


@pytest.mark.parametrize(
    ("hidden", "group", "device", "few"),
    [
        (4096, 16, RTX5090, False),
        (4096, 32, RTX5090, True),
        (4096, 128, RTX5090, True),
        (4096, 16, A100, True),
        (8192, 16, A100, False),
        (8192, 16, H100, True),
    ],
)
def test_scales_that_leave_no_room_for_few_rows_take_the_tile_of_many(plan: Planned, hidden, group, device, few):
    """A tile's 64 columns have 5 bytes of a scale and a zero point for each group, beside 48 KB of stages."""
    p = plan((1, 4, 32, hidden, 2048), BF16, UINT4, group=group, device=device)
    assert p.on_tensor_cores
    assert (p.tile_rows == FEW_ROWS) == few
    if few:
        assert (p.up.shared, p.down.shared) == tuple(3 * 2**14 + 64 * 5 * n // group + 8 for n in (hidden, 2048))


@pytest.mark.parametrize(("device", "resident"), [(H100, (2, 2)), (A100, (1, 2)), (RTX5090, (1, 1))])
def test_a_long_prompt_has_as_many_blocks_as_run_at_a_time(plan: Planned, device, resident):
    for stored, blocks in zip((BF16, MXFP4), resident, strict=True):
        p = plan((4096, *MODELS["gpt-oss"]), BF16, stored, device=device)
        assert (p.up.blocks, p.down.blocks) == (blocks * device[0],) * 2
        assert p.row_tiles * min(p.up_tiles, p.down_tiles) > 8 * p.up.blocks


def routed(experts: np.ndarray, count: int, hidden: int = 8, intermediate: int = 8) -> tuple[np.ndarray, Sizes]:
    """The workspace after a run with these experts of [tokens, slots], as the plugin leaves it."""
    tokens, slots = experts.shape
    attributes = {"activation": "silu", "alpha": 0.0, "limit": 0.0}
    attributes |= dict.fromkeys(("transposed", "interleaved", "scale_input"), False) | {"format": "plain", "group": 0}
    dtype = DTYPES["bf16"]
    inputs = [np.zeros((1, tokens, hidden), dtype), np.zeros((1, tokens, slots), dtype), experts[None]]
    inputs += [np.zeros((count, 2 * intermediate, hidden), dtype), np.zeros((count, hidden, intermediate), dtype)]
    run = lay_out(Library(emulated_library()).create("MoeExperts", attributes), CpuMemory(), inputs)
    run.enqueue(None)
    return run.workspace.read(), (tokens, slots, count, hidden, intermediate)


@pytest.mark.parametrize(
    ("tokens", "slots", "count", "least"),
    [(33, 1, 4, 0), (9, 8, 384, 0), (700, 3, 5, 0), (64, 4, 512, 0), (300, 2, 3, -1), (50, 1, 1, 0)],
)
def test_pairs_are_sorted_stably_and_cut_into_tiles(
    plan: Planned, workspace: Parted, tokens: int, slots: int, count: int, least: int
) -> None:
    """From -1 on some pairs have no expert; of five experts the last has no pairs."""
    random = np.random.default_rng(tokens)
    experts = random.integers(least, max(1, count - 1), (tokens, slots), np.int32)
    content, sizes = routed(experts, count)
    _, _, order_at, tiles_at, _ = workspace(sizes, BF16)
    p, flat = plan(sizes), experts.ravel()
    has = flat >= 0
    wanted = np.argsort(flat, kind="stable")[np.sum(~has) :]
    assert (content[order_at:tiles_at].view(np.int32)[: has.sum()] == wanted).all()
    found = content[tiles_at:].view(np.int32).reshape(-1, 4)
    counts = np.bincount(flat[has], minlength=count)
    ends, tiles = np.cumsum(counts), -(-counts // p.tile_rows)
    firsts = np.cumsum(tiles) - tiles
    rows = [[e, firsts[e], ends[e] - counts[e], ends[e]] for e in range(count) for _ in range(tiles[e])]
    assert found[: len(rows)].tolist() == rows
    assert (found[len(rows) : p.row_tiles, 0] == -1).all()
