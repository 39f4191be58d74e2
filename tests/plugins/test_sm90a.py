"""What common/sm90a.cuh says to wgmma and TMA: its index arithmetic by the PTX ISA, and products on the emulator."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from pathlib import Path

import pytest
from native import PLUGINS, SM90A, compiled, need_gpu, need_nvcc

HERE = Path(__file__).parent
SOURCE = HERE / "emulator" / "sm90a.cu"
COLUMNS = ("64", "128", "256")
SEEDS = ("0", *(pytest.param(seed, marks=pytest.mark.slow) for seed in "12"))
ROW, ATOM = 128, 1024


def run(program: Path, columns: str, bug: str = "none", seed: str = "0") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LLMEXPORT_EMULATOR_SEED": seed}
    return subprocess.run([program, columns, bug], env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def emulated() -> Path:
    return compiled("emulator_sm90a", sanitize=True)


@pytest.fixture(scope="module")
def arithmetic() -> ctypes.CDLL:
    return ctypes.CDLL(str(compiled("sm90a")))


def test_a_row_keeps_its_chunks_and_eight_rows_take_eight_places_for_one(arithmetic: ctypes.CDLL) -> None:
    places = [[arithmetic.sm90a_chunk(row, chunk) for chunk in range(8)] for row in range(64)]
    for row, of_row in enumerate(places):
        assert sorted(of_row) == list(range(row * 8, row * 8 + 8))
    for chunk in range(8):
        assert {places[row][chunk] % 8 for row in range(8)} == set(range(8))


def test_a_chunk_is_where_the_address_bits_put_it(arithmetic: ctypes.CDLL) -> None:
    """PTX: the 128-byte swizzle changes bits 4 to 6 of an address by its bits 7 to 9."""
    for row in range(128):
        for chunk in range(8):
            address = row * ROW + chunk * 16
            assert arithmetic.sm90a_chunk(row, chunk) * 16 == address ^ (address >> 7 & 7) << 4


@pytest.mark.parametrize("depth", [16, 64])
@pytest.mark.parametrize("address", [0, ATOM, 200 * ATOM])
def test_descriptors_have_the_fields_of_the_ptx_isa(arithmetic: ctypes.CDLL, address: int, depth: int) -> None:
    """Bits 0-13 the address, 16-29 leading, 32-45 stride, each in 16 bytes; 49-51 no base offset; 62-63 the swizzle.

    A step is 16 deep: 32 bytes on in each row of a K-major matrix, two atoms on in one that is MN-major.
    """
    for step in range(depth // 16):
        found = (ctypes.c_uint64 * 2)()
        arithmetic.sm90a_matrices(address, depth, step, found)
        k_major, mn_major = ({"first": d & 0x3FFF, "leading": d >> 16 & 0x3FFF, "rest": d >> 30} for d in found)
        stride_and_swizzle = ATOM // 16 << 2 | 1 << 32
        assert k_major == {"first": (address + step * 32) // 16, "leading": 1, "rest": stride_and_swizzle}
        assert mn_major == {
            "first": (address + step * 2 * ATOM) // 16,
            "leading": depth * ROW // 16,
            "rest": stride_and_swizzle,
        }


GOOD = {"data": 4096, "sizes": [72, 40, 3, 2], "strides": [72, 72 * 40, 72 * 120], "box": [64, 128, 1, 1]}


@pytest.mark.parametrize(
    ("change", "served"),
    [
        ({}, True),
        ({"data": 4096 + 8}, False),
        ({"strides": [68, 72 * 40, 72 * 120]}, False),
        ({"strides": [0, 72 * 40, 72 * 120]}, False),
        ({"strides": [72, 72 * 40, 2**39]}, False),
        ({"sizes": [72, 0, 3, 2]}, False),
        ({"sizes": [72, 2**32 + 1, 3, 2]}, False),
        ({"box": [32, 128, 1, 1]}, False),
        ({"box": [64, 257, 1, 1]}, False),
    ],
)
def test_tma_serves_what_the_driver_would_take(arithmetic: ctypes.CDLL, change: dict, served: bool) -> None:
    of = {**GOOD, **change}
    arithmetic.sm90a_serves.restype = ctypes.c_bool
    sizes, strides = (ctypes.c_int64 * 4)(*of["sizes"]), (ctypes.c_int64 * 3)(*of["strides"])
    found = arithmetic.sm90a_serves(ctypes.c_uint64(of["data"]), sizes, strides, (ctypes.c_int * 4)(*of["box"]))
    assert found == served


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_products_are_right_under_sanitizers(emulated: Path, columns: str, seed: str) -> None:
    done = run(emulated, columns, seed=seed)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("bug", "says"),
    [
        ("no_proxy_fence", "wgmma reads what a thread wrote, and no fenceProxyAsync of its is between"),
        ("stored_unfenced", "wgmma reads what a thread wrote, and no fenceProxyAsync of its is between"),
        ("anothers_fence", "wgmma reads what a thread wrote, and no fenceProxyAsync of its is between"),
        ("assigned", "wgmma reads what a thread wrote by an assignment"),
        ("stored_under_tma", "TMA writes where a thread wrote, and no fenceProxyAsync of its is between"),
        ("no_expectation", "for an mbarrier at line|ends before . loads of TMA|WRONG NUMBERS"),
        ("early_release", "WRONG NUMBERS"),
        ("late_wait", "WRONG NUMBERS"),
        ("changed_rows", "rows of A change in the registers before the wait"),
        ("half_a_warpgroup", "warps of a warpgroup issue different wgmma"),
    ],
)
def test_each_mistake_shows(emulated: Path, bug: str, says: str, seed: str) -> None:
    done = run(emulated, "64", bug, seed)
    assert done.returncode != 0
    assert re.search(says, done.stdout + done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("source", [SOURCE, *sorted(PLUGINS.glob("*/*_sm90a.cu"))], ids=lambda path: path.stem)
def test_compiles_for_sm_90a_and_waits_for_no_wgmma(tmp_path: Path, source: Path) -> None:
    """No spill, no local memory. A wgmma that the compiler has to wait for is no warning of ptxas, but is said."""
    command = [need_nvcc(), "-std=c++17", "-I", PLUGINS, *SM90A, "-c", source, "-o", tmp_path / "sm90a.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "serialized" not in done.stdout + done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("columns", COLUMNS)
def test_gpu_agrees_with_the_emulator(tmp_path: Path, columns: str) -> None:
    """Kernel and emulator follow one reading of the PTX ISA: only a GPU can say that it is right."""
    need_gpu()
    import torch

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma is of compute capability 9.0 alone")
    program = tmp_path / "sm90a"
    subprocess.run([need_nvcc(), "-std=c++17", "-I", PLUGINS, *SM90A, SOURCE, "-o", program], check=True)
    done = run(program, columns)
    assert done.returncode == 0, done.stdout + done.stderr
