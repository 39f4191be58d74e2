"""Launch plans are functions of shapes: within every architecture's limits, covering all, wasting no block."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native import beside_emulated

HERE = Path(__file__).parent
ITEM_SIZES = (4, 2, 2)  # of fp32, fp16, bf16
WARP = 32
# The same on sm_80 to sm_120 (CUDA programming guide, technical specifications per compute capability).
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_BLOCK, MAX_THREADS = (1024, 1024, 64), 1024
SHARED_WITHOUT_ASKING, SHARED_OF_ALL = 48 * 1024, 99 * 1024
# __launch_bounds__ of the kernels.
ROPE_THREADS, HEAD_THREADS, NORM_THREADS, ACT_THREADS, CONV_THREADS, ROUTE_THREADS = 256, 256, 512, 256, 128, 128
DECODE_THREADS, GATE_THREADS = 512, 256
ROPE_HEADS, ACT_VECTORS = 4, 2
CONV_TOKENS = (8, 64)  # of a chunk, at least and at most


@dataclass(frozen=True)
class Plan:
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    width: int
    vectors: int  # or what else an op's plan says
    chunks: int

    def check(self, threads: int) -> None:
        assert all(0 < n <= most for n, most in zip(self.grid, MAX_GRID, strict=True))
        assert all(0 < n <= most for n, most in zip(self.block, MAX_BLOCK, strict=True))
        assert math.prod(self.block) <= min(threads, MAX_THREADS)
        assert self.shared <= SHARED_WITHOUT_ASKING


@pytest.fixture(scope="module")
def plan() -> Callable[..., Plan]:
    library = beside_emulated("plans.cpp")

    def made(op: str, sizes: tuple[int, ...], dtype: int, aligned: bool) -> Plan:
        out = (ctypes.c_int64 * 10)()
        given_sizes = (ctypes.c_int64 * len(sizes))(*sizes)
        getattr(library, f"plan_{op}")(given_sizes, dtype, ctypes.c_bool(aligned), out)
        return Plan(tuple(out[0:3]), tuple(out[3:6]), *out[6:10])

    return made


few, some, many = st.integers(1, 300), st.integers(1, 20000), st.integers(1, 2**24)
kinds = st.integers(0, 2)
several = settings(max_examples=200, deadline=None, derandomize=True)


@several
@given(st.tuples(few, few, few, st.integers(1, 600), st.integers(0, 300)), kinds, st.booleans())
def test_rope(plan, sizes, dtype, aligned):
    b, h, t, d, r = sizes
    r = min(r, d // 2)
    p = plan("rope", (b, h, t, d, r), dtype, aligned)
    p.check(ROPE_THREADS)
    assert p.grid[0] * p.block[1] >= b * t > (p.grid[0] - 1) * p.block[1]
    assert p.grid[1] * ROPE_HEADS >= h > (p.grid[1] - 1) * ROPE_HEADS
    full = 16 // ITEM_SIZES[dtype]
    assert p.width == (full if aligned and d % full == 0 and r % full == 0 else 1)


@several
@given(st.tuples(few, few, few, few, st.integers(1, 600), st.integers(0, 300), st.integers(0, 9)), kinds, st.booleans())
def test_qk_norm_rope(plan, sizes, dtype, aligned):
    b, t, h, g, d, r, behind = sizes
    r = min(r, d // 2)
    p = plan("qk_norm_rope", (b, t, h, g, d, r, d + behind), dtype, aligned)
    p.check(HEAD_THREADS)
    assert p.grid[0] == b * t
    assert p.grid[1] * p.block[1] >= h + 2 * g > (p.grid[1] - 1) * p.block[1]
    # Lanes of a head shuffle: a power of two within a warp, and whole warps a block.
    assert WARP % p.block[0] == 0
    assert math.prod(p.block) % WARP == 0
    full = 16 // ITEM_SIZES[dtype]
    assert p.width == (full if aligned and not (d % full or r % full or behind % full) else 1)
    units = (d - r) // p.width
    assert p.block[0] < 2 * units or p.block[0] == 1
    assert p.vectors == (units <= p.block[0])


@several
@given(many, some, kinds, st.booleans())
def test_rows_of_a_norm(plan, rows, columns, dtype, aligned):
    p = plan("rows", (rows, columns), dtype, aligned)
    p.check(NORM_THREADS)
    assert p.grid[0] * p.block[1] >= rows > (p.grid[0] - 1) * p.block[1]
    # Shuffles and warps of a row: a power of two within a warp, or whole warps, and whole warps a block.
    assert WARP % p.block[0] == 0 or p.block[0] % WARP == 0
    assert math.prod(p.block) % WARP == 0
    if p.vectors:
        assert p.block[0] * p.vectors * p.width >= columns
        assert columns % p.width == 0


@several
@given(st.integers(1, 2**40), kinds, st.booleans())
def test_gated_act(plan, count, dtype, aligned):
    p = plan("gated_act", (1, count, 0), dtype, aligned)
    per_block = p.block[0] * ACT_VECTORS * p.width
    if p.grid[0] < MAX_GRID[0]:
        p.check(ACT_THREADS)
        assert p.grid[0] * per_block >= count > (p.grid[0] - 1) * per_block


@several
@given(many, some, kinds, st.booleans())
def test_gated_act_of_halves(plan, rows, columns, dtype, aligned):
    p = plan("gated_act", (rows, columns, 1), dtype, aligned)
    p.check(ACT_THREADS)
    full = 16 // ITEM_SIZES[dtype]
    assert p.width == (full if aligned and columns % full == 0 else 1)
    assert p.grid[0] == rows
    per_block = p.block[0] * ACT_VECTORS * p.width
    assert p.grid[1] * per_block >= columns > (p.grid[1] - 1) * per_block
    # A warp for each vector of a thread, at most, has nothing to do.
    assert p.block[0] % WARP == 0
    assert (p.block[0] - WARP) * p.grid[1] * ACT_VECTORS * p.width < columns


@several
@given(st.tuples(few, some, some, st.integers(2, 4), st.integers(1, 200)), kinds, st.booleans())
def test_causal_conv1d(plan, sizes, dtype, aligned):
    b, t, c, *_ = sizes
    p = plan("causal_conv1d", sizes, dtype, aligned)
    p.check(CONV_THREADS)
    length, chunks, vectors = p.vectors, b * p.chunks, c // p.width
    assert p.width == (16 // ITEM_SIZES[dtype] if aligned and c * ITEM_SIZES[dtype] % 16 == 0 else 1)
    assert CONV_TOKENS[0] <= length <= CONV_TOKENS[1]
    assert p.chunks * length >= t > (p.chunks - 1) * length
    assert p.grid[0] * p.block[1] >= chunks > (p.grid[0] - 1) * p.block[1]
    assert p.grid[1] * p.block[0] >= vectors > (p.grid[1] - 1) * p.block[0]


@pytest.mark.parametrize(("tokens", "length"), [(1, 8), (512, 8), (4096, 32), (16384, 64)])
def test_conv_keeps_every_sm_busy_with_chunks_as_long_as_may_be(plan, tokens, length):
    """Qwen3.5: 8192 channels in bf16, on an H200."""
    p = plan("causal_conv1d", (1, tokens, 8192, 4, 132), 2, True)
    assert (p.width, p.vectors, p.chunks) == (8, length, -(-tokens // length))


@several
@given(few, st.just(1) | some, few, st.sampled_from((16, 32, 64, 128)), st.integers(1, 200), st.booleans())
def test_gated_delta_net(plan, batch, tokens, heads, width, processors, aligned):
    p = plan("gated_delta_net", (batch, tokens, 32 + heads * width, heads, 16, width, processors), 2, aligned)
    assert p.width == (4 if aligned else 1)
    assert p.vectors == (tokens == 1 and batch * heads <= 2 * processors)
    if p.vectors:
        p.check(DECODE_THREADS)
        assert p.grid == (heads, batch, 1)
        assert p.block[0] == 128
        assert p.block[1] * 32 >= width > (p.block[1] - 1) * 32
    else:
        p.check(GATE_THREADS)
        assert p.grid[0] * p.block[0] >= batch * tokens * heads > (p.grid[0] - 1) * p.block[0]


@pytest.mark.parametrize(("batch", "together"), [(1, True), (8, True), (9, False), (64, False)])
def test_a_token_of_a_delta_net_is_one_launch_where_its_heads_fill_an_h200_twice_at_most(plan, batch, together):
    """Qwen3.5: 32 heads of 128 by 128."""
    assert plan("gated_delta_net", (batch, 1, 8192, 32, 128, 128, 132), 2, True).vectors == together


@several
@given(few, many)
def test_wkv(plan, batch, channels):
    p = plan("wkv", (batch, 1, channels), 2, True)
    p.check(WARP)
    assert p.grid[1] == batch
    assert p.grid[0] * p.block[0] >= channels > (p.grid[0] - 1) * p.block[0]


@several
@given(few, few, few)
def test_wkv7(plan, batch, heads, rows):
    p = plan("wkv7", (batch, 1, heads, 64, rows), 2, True)
    p.check(2 * WARP)
    assert p.grid[1:] == (heads, batch)
    # Four lanes a row.
    assert p.grid[0] * p.block[0] >= 4 * rows > (p.grid[0] - 1) * p.block[0]


@several
@given(many, st.integers(2, 512), st.integers(1, 512), st.booleans())
def test_moe_route(plan, rows, experts, top_k, grouped):
    top_k = min(top_k, experts)
    p = plan("moe_route", (rows, experts, top_k, 2 if grouped else 1), 2, True)
    p.check(ROUTE_THREADS)
    assert p.grid[0] * p.block[1] >= rows > (p.grid[0] - 1) * p.block[1]
    # Shuffles of a row stay in a warp, and all lanes of a warp are there.
    assert WARP % p.block[0] == 0
    assert math.prod(p.block) % WARP == 0
    assert p.block[0] * p.vectors >= experts
    assert p.block[0] == WARP if grouped else p.block[0] == 1 or p.block[0] // 2 * p.vectors < experts
    # An expert and a weight for each winner; with groups a choice for each expert.
    assert p.shared == p.block[1] * (8 * top_k + (4 * experts if grouped else 0))


@several
@given(many, st.integers(2, 512), st.integers(1, 512), st.booleans())
def test_normed_moe_route(plan, rows, experts, top_k, gated):
    """A cluster of 8 blocks takes 16 rows, and its sums, and a route, fit what every architecture's blocks may have."""
    cluster, products, route = (
        plan("normed_moe_route", (rows, experts, min(top_k, experts), gated, which), 2, True) for which in range(3)
    )
    tiles = -(-rows // 16)
    assert (cluster.grid, cluster.width) == ((8 * tiles, 1, 1), 8)
    assert cluster.vectors == products.vectors == (8 if rows <= 512 else 1)
    assert (products.grid, products.width, products.shared) == ((products.vectors * tiles, 1, 1), 1, 0)
    assert route.grid[0] * 8 >= rows > (route.grid[0] - 1) * 8
    for p in (cluster, products, route):
        assert p.block == (WARP, 8, 1)
        assert 0 < p.grid[0] <= MAX_GRID[0]
        assert p.shared <= SHARED_OF_ALL
    # The sums of 16 rows, and the logits of those that it routes.
    assert cluster.shared >= (16 + 2) * 4 * (experts + gated)


@pytest.mark.parametrize(
    ("columns", "rows_per_block", "vectors"),
    [(128, 8, 1), (256, 4, 1), (512, 4, 2), (1024, 4, 4), (2048, 1, 2), (4096, 1, 2), (8192, 1, 4), (16384, 1, 4)],
)
def test_norm_keeps_the_rows_of_real_models_in_registers(plan, columns, rows_per_block, vectors):
    p = plan("rows", (4096, columns), 2, True)
    assert (p.block[1], p.vectors, p.width) == (rows_per_block, vectors, 8)
