"""MoeExperts by wgmma and TMA: which nodes it takes, what TMA reads of the weights, which tile a block takes."""

from __future__ import annotations

import ctypes
import itertools
import subprocess
from pathlib import Path

import numpy as np
import pytest
from native import PLUGINS, SM90A, compiled, emulated_library, need_nvcc

HERE = Path(__file__).parent
FP32, FP16, BF16 = range(3)
MXFP4 = -1
PLAIN, HALVES, PAIRS = range(3)
ROWS, COLUMNS, DEPTH = 128, 256, 64


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    flags = ["-shared", "-DLLMEXPORT_EMULATED", "-Wno-unknown-pragmas", "-Wl,--no-as-needed", str(emulated_library())]
    return ctypes.CDLL(str(compiled("moe-experts-sm90a", [HERE / "moe_experts_sm90a.cpp"], flags)))


def test_compiles_for_sm_90a_and_waits_for_no_wgmma(tmp_path: Path) -> None:
    """No spill, no local memory. A wgmma that the compiler has to wait for is no warning of ptxas, but is said."""
    source = PLUGINS / "moe_experts" / "grouped_gemm_sm90a.cu"
    command = [need_nvcc(), "-std=c++17", "-I", PLUGINS, *SM90A, "-c", source, "-o", tmp_path / "sm90a.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "serialized" not in done.stdout + done.stderr


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
        (GPT_OSS, BF16, MXFP4, True, 90, False),
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
def test_takes_prefill_of_16_bits_on_hopper_alone(
    library: ctypes.CDLL,
    sizes: tuple[int, ...],
    dtype: int,
    stored: int,
    aligned: bool,
    capability: int,
    taken: bool,
) -> None:
    library.moe_on_sm90a.restype = ctypes.c_bool
    given = (ctypes.c_int64 * 5)(*sizes)
    assert library.moe_on_sm90a(given, dtype, stored, ctypes.c_bool(aligned), capability) == taken


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
    """Every element of every box, where all weights are different numbers and what TMA adds is -1."""
    width = columns if kind == PLAIN else 2 * columns
    weights = np.arange(experts * width * depth).reshape(experts, width, depth)
    stored = weights.swapaxes(1, 2) if transposed else weights
    memory = np.ascontiguousarray(stored).ravel()
    out, place = (ctypes.c_int64 * 11)(), (ctypes.c_int * 2)()
    library.moe_weights(kind, transposed, interleaved, depth, columns, experts, out)
    sizes, strides, box = out[:4], [1, *out[4:7]], out[7:]
    box_columns = box[0] if transposed else box[2]
    assert box[2 if transposed else 0] == DEPTH

    def read(*first: int) -> np.ndarray:
        found = np.full(box, -1)
        for at in itertools.product(*(range(min(b, s - f)) for b, s, f in zip(box, sizes, first, strict=True))):
            found[at] = memory[sum((a + f) * s for a, f, s in zip(at, first, strides, strict=True))]
        return found

    per_tile = COLUMNS // 2 if kind == HALVES else COLUMNS
    for tile in range(-(-(width if kind == PAIRS else columns) // per_tile)):
        for k, i in itertools.product(range(0, depth, DEPTH), range(COLUMNS // box_columns)):
            library.moe_weight_box(kind, tile, box_columns, i, place)
            column, half = place
            found = read(*((column, half, k) if transposed else (k, half, column)), experts - 1)
            found = found.reshape(box_columns, DEPTH) if transposed else found.reshape(DEPTH, box_columns)
            found = found if transposed else found.T
            for c in range(box_columns):
                at = weight_of(kind, interleaved, columns, tile, i * box_columns + c)
                there = weights[experts - 1, at, k : k + DEPTH] if at is not None else np.zeros(0)
                assert (found[c, : len(there)] == there).all()
                assert (found[c, len(there) :] == -1).all()


@pytest.mark.parametrize("column_tiles", [1, 3])
@pytest.mark.parametrize("counts", [[0, 1, 128, 0, 129, 300], [5], [128] * 3, [0, 700, 0]])
def test_pieces_are_every_row_and_tile_of_columns_once(
    library: ctypes.CDLL, counts: list[int], column_tiles: int
) -> None:
    ends = np.cumsum(counts)
    row_tiles = [-(-c // ROWS) for c in counts]
    firsts = np.cumsum(row_tiles) - row_tiles
    tiles = [(e, firsts[e], ends[e] - counts[e], ends[e]) for e in range(len(counts)) for _ in range(row_tiles[e])]
    taken = np.zeros((sum(counts), column_tiles), int)
    share = (ctypes.c_int * 4)()
    for work in range(len(tiles) * column_tiles):
        tile = tiles[work // column_tiles]
        library.moe_share((ctypes.c_int * 4)(*tile), ctypes.c_int64(work), column_tiles, share)
        expert, first, rows, columns = share
        assert expert == tile[0]
        assert 0 < rows <= ROWS
        assert tile[2] <= first < first + rows <= tile[3]
        taken[first : first + rows, columns] += 1
    assert (taken == 1).all()
