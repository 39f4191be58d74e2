"""SinkAttention by wgmma and TMA: which nodes it takes, what TMA reads of the caches, where tiles have their chunks."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from attention_nodes import Shape, near
from native import beside_emulated
from plugin_host import Machine
from plugin_memory import CpuMemory

HERE = Path(__file__).parent
FP32, FP16, BF16 = range(3)
SHARED_BYTES = 227 * 1024  # of a block on sm_90, of which the barriers take an atom
ATOM, ROW = 1024, 128


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    built = beside_emulated("sink_attention_sm90a.cpp")
    built.attention_on_sm90a.restype = ctypes.c_bool
    return built


GPT_OSS, GEMMA, QWEN = (1, 64, 8, 4096, 4096, 64), (1, 8, 4, 4096, 8192, 256), (1, 16, 2, 2048, 2048, 256)


@pytest.mark.parametrize(
    ("sizes", "dtype", "aligned", "capability", "taken"),
    [
        (GPT_OSS, BF16, True, 90, True),
        (GEMMA, FP16, True, 90, True),
        (QWEN, BF16, True, 90, True),
        (GPT_OSS, BF16, True, 89, False),
        (GPT_OSS, BF16, True, 100, False),
        (GPT_OSS, BF16, True, 120, False),
        (GPT_OSS, FP32, True, 90, False),
        (GPT_OSS, BF16, False, 90, False),
        ((1, 64, 8, 4096, 4096, 60), BF16, True, 90, False),
        ((1, 64, 8, 1, 4096, 64), BF16, True, 90, False),
        ((1, 64, 8, 8, 4096, 64), BF16, True, 90, False),
        ((1, 64, 8, 9, 4096, 64), BF16, True, 90, True),
        ((1, 64, 8, 9, 0, 64), BF16, True, 90, False),
    ],
)
def test_takes_prefill_of_16_bits_on_sm90_alone(
    library: ctypes.CDLL, sizes: tuple[int, ...], dtype: int, aligned: bool, capability: int, taken: bool
) -> None:
    given = (ctypes.c_int64 * 6)(*sizes)
    assert library.attention_on_sm90a(given, dtype, ctypes.c_bool(aligned), capability) == taken


# By tokens, keys, head size and window.
FASTER = [(65, 65, 64, 0), (65, 65, 64, 65), (40, 2000, 64, 1024), (65, 600, 128, 512), (128, 200, 256, 20)]
SLOWER = [(65, 66, 64, 65), (40, 2000, 64, 1023), (65, 600, 128, 511), (127, 200, 256, 0)]


@pytest.mark.parametrize(
    ("size", "said", "taken"),
    [
        *((size, None, True) for size in FASTER),
        *((size, None, False) for size in SLOWER),
        *((SLOWER[0], said, said == "1") for said in ("1", "0", "2", "")),
        (FASTER[0], "0", False),
    ],
)
def test_is_used_where_it_is_faster_or_asked_for(
    machine: Machine,
    wgmma_count: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
    size: tuple[int, int, int, int],
    said: str | None,
    taken: bool,
) -> None:
    if machine.memory is not CpuMemory:
        pytest.skip("the emulator counts")
    monkeypatch.delenv("LLMEXPORT_SM90A")
    if said is not None:
        monkeypatch.setenv("LLMEXPORT_SM90A", said)
    tokens, keys, head, window = size
    before = wgmma_count()
    assert near(machine, Shape(1, 2, 1, tokens, keys, head, window=window), "bf16")
    assert (wgmma_count() > before) == taken


def test_tiles_fit_into_shared_memory(library: ctypes.CDLL) -> None:
    """128 rows of queries, and two tiles of keys and of values."""
    keys, shared = (ctypes.c_int * 3)(), (ctypes.c_int * 3)()
    library.attention_tiles(keys, shared)
    for size, of_tile, found in zip((64, 128, 256), keys, shared, strict=True):
        assert found == (128 + 4 * of_tile) * size * 2
        assert found + ATOM <= SHARED_BYTES
        # Of wgmma's columns, of a depth of 16, and of TMA's boxes.
        assert of_tile in (64, 128)


@pytest.mark.parametrize("rows", [64, 128])
def test_a_chunk_is_where_tma_would_put_it(library: ctypes.CDLL, rows: int) -> None:
    """Boxes of 64 columns one after another, [rows, 128 bytes], where bits 4 to 6 of an address change by 7 to 9."""
    for row in range(rows):
        for chunk in range(32):
            address = chunk // 8 * rows * ROW + row * ROW + chunk % 8 * 16
            assert library.attention_place(rows, row, chunk) * 2 == address ^ (address >> 7 & 7) << 4


@pytest.mark.parametrize("sizes", [(2, 6, 3, 70, 40, 72), (1, 1, 1, 70, 5, 16)])
def test_tma_reads_keys_of_one_group(library: ctypes.CDLL, sizes: tuple[int, ...]) -> None:
    B, _, G, _, S, D = sizes
    out = (ctypes.c_int64 * 11)()
    library.attention_keys((ctypes.c_int64 * 6)(*sizes), 128, out)
    assert out[:4] == [D, S, G, B]
    assert out[7:] == [64, 128, 1, 1]
    cache = np.arange(B * G * S * D).reshape(B, G, S, D)
    at = np.indices((B, G, S, D))
    assert (cache == sum(i * s for i, s in zip(at, [*out[6:3:-1], 1], strict=True))).all()
