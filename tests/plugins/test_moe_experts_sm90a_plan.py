"""MoeExperts by wgmma and TMA: which nodes it takes, what TMA reads of the weights, which tile a block takes."""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path

import numpy as np
import pytest
from native import beside_emulated

HERE = Path(__file__).parent
FP32, FP16, BF16 = range(3)
BYTES = 3
FORMATS = ("plain", "mxfp4", "mxfp8", "nvfp4", "fp8", "uint4", "uint8", "int8")
PLAIN, HALVES, PAIRS = range(3)
ROWS, COLUMNS, DEPTH = 128, 256, 64
PROCESSORS = 132
WGMMA_ROWS = 64
ALONE = -1  # for the rank of a block in a cluster


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return beside_emulated("moe_experts_sm90a.cpp")


QWEN, GPT_OSS, SCOUT = (4096, 8, 256, 2048, 512), (4096, 4, 32, 2880, 2880), (4096, 1, 16, 5120, 8192)


@pytest.mark.parametrize(
    ("sizes", "dtype", "stored", "aligned", "capability", "taken"),
    [
        (QWEN, BF16, BF16, True, 90, True),
        (GPT_OSS, FP16, FP16, True, 90, True),
        (SCOUT, BF16, BF16, True, 90, True),
        (QWEN, BF16, BF16, True, 89, False),
        (QWEN, BF16, BF16, True, 100, False),
        (QWEN, BF16, BF16, True, 120, False),
        (QWEN, BF16, FP16, True, 90, False),
        (QWEN, FP32, FP32, True, 90, False),
        (QWEN, BF16, BF16, False, 90, False),
        ((4096, 8, 256, 2052, 512), BF16, BF16, True, 90, False),
        ((4096, 8, 256, 2048, 516), BF16, BF16, True, 90, False),
        ((512, 8, 256, 2048, 512), BF16, BF16, True, 90, False),
        ((513, 8, 256, 2048, 512), BF16, BF16, True, 90, True),
        ((32, 1, 1, 64, 64), BF16, BF16, True, 90, False),
        ((33, 1, 1, 64, 64), BF16, BF16, True, 90, True),
    ],
)
def test_takes_prefill_of_16_bits_on_sm90_alone(
    library: ctypes.CDLL,
    sizes: tuple[int, ...],
    dtype: int,
    stored: int,
    aligned: bool,
    capability: int,
    taken: bool,
) -> None:
    given = (ctypes.c_int64 * 5)(*sizes)
    # Before these forms of weights the library has that of an op without any.
    arguments = (given, dtype, 1 + stored, 0, False, ctypes.c_bool(aligned), capability)
    assert library.moe_on_sm90a(*arguments, PROCESSORS) == (2 if taken else 0)
    # A cluster is of two blocks.
    assert library.moe_on_sm90a(*arguments, 1) == (1 if taken else 0)


@pytest.mark.parametrize(
    ("sizes", "dtype", "format", "factors", "capability", "taken"),
    [
        (GPT_OSS, BF16, "mxfp4", False, 90, True),
        (GPT_OSS, FP16, "mxfp4", False, 90, True),
        (GPT_OSS, FP32, "mxfp4", False, 90, False),
        (GPT_OSS, BF16, "mxfp4", False, 89, False),
        (GPT_OSS, BF16, "mxfp4", False, 100, False),
        (GPT_OSS, BF16, "mxfp4", True, 90, True),
        (QWEN, BF16, "nvfp4", False, 90, True),
        (QWEN, FP16, "fp8", True, 90, True),
        (QWEN, BF16, "uint4", True, 90, True),
        (QWEN, BF16, "int8", False, 89, False),
        ((128, 4, 32, 2880, 2880), BF16, "mxfp4", False, 90, False),
        ((129, 4, 32, 2880, 2880), BF16, "mxfp4", False, 90, True),
        ((33, 1, 1, 32, 96), BF16, "mxfp4", False, 90, True),
        ((33, 1, 1, 48, 96), BF16, "mxfp4", False, 90, False),
        ((33, 1, 1, 96, 48), BF16, "mxfp4", False, 90, False),
        ((33, 1, 1, 48, 96), BF16, "int8", False, 90, True),
        ((33, 1, 1, 40, 96), BF16, "int8", False, 90, False),
    ],
)
def test_takes_prefill_of_packed_weights(
    library: ctypes.CDLL,
    sizes: tuple[int, ...],
    dtype: int,
    format: str,
    factors: bool,
    capability: int,
    taken: bool,
) -> None:
    given, number = (ctypes.c_int64 * 5)(*sizes), FORMATS.index(format)
    arguments = (given, dtype, 1 + BYTES, number, ctypes.c_bool(factors), True, capability)
    assert library.moe_on_sm90a(*arguments, PROCESSORS) == (1 if taken else 0)


def weight_of(kind: int, interleaved: bool, columns: int, tile: int, c: int) -> int | None:
    """The column of the weights that column `c` of a tile is, if it is there."""
    if kind != HALVES:
        at = tile * COLUMNS + c
        return at if at < (columns if kind == PLAIN else 2 * columns) else None
    is_up, at = c // (COLUMNS // 2), tile * COLUMNS // 2 + c % (COLUMNS // 2)
    if at >= columns:
        return None
    return 2 * at + is_up if interleaved else is_up * columns + at


@pytest.mark.parametrize(
    ("kind", "transposed", "interleaved"),
    [
        *itertools.product([PLAIN], [False, True], [False, True]),
        *itertools.product([HALVES], [False], [False, True]),
        (HALVES, True, False),
        (PAIRS, True, True),
    ],
)
@pytest.mark.parametrize(("depth", "columns", "experts"), [(64, 128, 1), (72, 40, 3), (136, 296, 2)])
def test_tma_reads_the_columns_of_a_tile(
    library: ctypes.CDLL, kind: int, transposed: bool, interleaved: bool, depth: int, columns: int, experts: int
) -> None:
    """Every element of every box, where all weights are different numbers and what TMA adds is -1. Dimensions are
    nested, as cuTensorMapEncodeTiled asks.
    """
    width = columns if kind == PLAIN else 2 * columns
    weights = np.arange(experts * width * depth).reshape(experts, width, depth)
    memory = np.ascontiguousarray(weights.swapaxes(1, 2) if transposed else weights).ravel()
    out, place = (ctypes.c_int64 * 11)(), (ctypes.c_int * 3)()
    library.moe_weights(kind, transposed, interleaved, depth, columns, experts, out)
    sizes, strides, box = out[:4], [1, *out[4:7]], out[7:]
    for size, stride, following in zip(sizes, strides, [*strides[1:], len(memory)], strict=True):
        assert following >= size * stride
    assert box[2 if transposed else 0] == DEPTH
    box_columns = np.prod(box) // DEPTH

    def read(*first: int) -> np.ndarray:
        found = np.full(box, -1)
        for at in itertools.product(*(range(min(b, s - f)) for b, s, f in zip(box, sizes, first, strict=True))):
            found[at] = memory[sum((a + f) * s for a, f, s in zip(at, first, strides, strict=True))]
        return found.reshape(box_columns, DEPTH) if transposed else found.reshape(DEPTH, box_columns).T

    per_tile = COLUMNS // 2 if kind == HALVES else COLUMNS
    for tile in range(-(-(width if kind == PAIRS else columns) // per_tile)):
        for k, i in itertools.product(range(0, depth, DEPTH), range(COLUMNS // box_columns)):
            library.moe_weight_box(kind, transposed, interleaved, tile, i, k, place)
            found = read(*place, experts - 1)
            for c in range(box_columns):
                at = weight_of(kind, interleaved, columns, tile, i * box_columns + c)
                there = weights[experts - 1, at, k : k + DEPTH] if at is not None else np.zeros(0)
                assert (found[c, : len(there)] == there).all()
                assert (found[c, len(there) :] == -1).all()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("kind", [PLAIN, HALVES])
@pytest.mark.parametrize("columns", [40, 128, 296])
def test_packed_weights_have_the_same_columns_in_a_tile(
    library: ctypes.CDLL, kind: int, interleaved: bool, columns: int
) -> None:
    for tile, c in itertools.product(range(2), range(COLUMNS)):
        found = library.moe_weight_row(kind, interleaved, columns, tile, c)
        at = weight_of(kind, interleaved, columns, tile, c)
        assert found == (-1 if at is None else at)


@pytest.mark.parametrize("ranks", [[ALONE], [0, 1]], ids=["alone", "cluster"])
@pytest.mark.parametrize("column_tiles", [1, 3])
@pytest.mark.parametrize("counts", [[0, 1, 128, 0, 129, 300], [5], [128] * 3, [0, 700, 0], [64, 65, 192, 193, 256]])
def test_pieces_are_every_row_and_tile_of_columns_once(
    library: ctypes.CDLL, counts: list[int], column_tiles: int, ranks: list[int]
) -> None:
    """In a cluster the first block has as many whole products as the second, or one more."""
    ends = np.cumsum(counts)
    row_tiles = [-(-c // (ROWS * len(ranks))) for c in counts]
    firsts = np.cumsum(row_tiles) - row_tiles
    tiles = [(e, firsts[e], ends[e] - counts[e], ends[e]) for e in range(len(counts)) for _ in range(row_tiles[e])]
    taken = np.zeros((sum(counts), column_tiles), int)
    share = (ctypes.c_int * 4)()
    for work in range(len(tiles) * column_tiles):
        tile, products = tiles[work // column_tiles], []
        for rank in ranks:
            library.moe_share((ctypes.c_int * 4)(*tile), ctypes.c_int64(work), column_tiles, rank, share)
            expert, first, rows, columns = share
            assert expert == tile[0]
            assert (0 if rank == 1 else 1) <= rows <= ROWS
            # Where the order of pairs is read, there is one.
            assert tile[2] <= first + rows - 1 < first + rows <= tile[3]
            taken[first : first + rows, columns] += 1
            products.append(-(-rows // WGMMA_ROWS))
        assert products[0] - products[-1] in (0, 1)
    assert (taken == 1).all()


@pytest.mark.parametrize(
    ("row_tiles", "columns", "processors", "cluster", "blocks"),
    [
        (1, 256, 132, 1, 1),
        (50, 700, 132, 1, 132),
        (1, 256, 132, 2, 2),
        (21, 700, 132, 2, 126),
        (50, 700, 132, 2, 132),
        (50, 700, 133, 2, 132),
        (50, 700, 3, 2, 2),
    ],
)
def test_blocks_are_whole_clusters_and_no_more_than_run_at_a_time(
    library: ctypes.CDLL, row_tiles: int, columns: int, processors: int, cluster: int, blocks: int
) -> None:
    found = (ctypes.c_int * 2)()
    library.moe_blocks(ctypes.c_int64(row_tiles), columns, processors, cluster, found)
    assert list(found) == [blocks, cluster]
