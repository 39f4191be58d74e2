"""Blocks of a cluster that load for each other, on the emulator, which finds what is wrong between them."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from native import PLUGINS, SM90A, compiled, need_gpu, need_nvcc

SOURCE = Path(__file__).parent / "emulator" / "cluster.cu"
SEEDS = "012345"  # which of the blocks is behind, if one is, and the order of threads


def run(program: Path, bug: str = "none", seed: str = "0") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LLMEXPORT_EMULATOR_SEED": seed}
    return subprocess.run([program, bug], env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def emulated() -> Path:
    return compiled("emulator_cluster", sanitize=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_products_are_right_under_sanitizers(emulated: Path, seed: str) -> None:
    done = run(emulated, seed=seed)
    assert done.returncode == 0, done.stdout + done.stderr


def test_clusters_that_no_gpu_has_are_refused(emulated: Path) -> None:
    done = run(emulated, "refused")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("bug", "says"),
    [
        ("no_start", "in a block of the cluster that has not come to it|at an mbarrier that is not initialised"),
        ("no_end", "in a block of the cluster that has ended|a block ends before [0-9]+ loads of TMA"),
        ("own_arrivals", "deadlock: [0-9]+ of 160 threads wait, .*, for (an mbarrier|barrier.cluster) at line"),
        ("own_arrivals_expected", "WRONG NUMBERS|more arrive at an mbarrier|deadlock"),
        ("one_arrive_too_few", "deadlock: [0-9]+ of 160 threads wait, .*, for (an mbarrier|barrier.cluster) at line"),
        ("wrong_phase", "deadlock: 160 of 160 threads wait, .*, for (an mbarrier|barrier.cluster) at line"),
        ("slices_swapped", "WRONG NUMBERS"),
        ("half_expected", "WRONG NUMBERS|deadlock|ends before [0-9]+ loads of TMA"),
        ("into_one_block", "deadlock: [0-9]+ of 160 threads wait, .*, for (an mbarrier|barrier.cluster) at line"),
        ("no_such_block", "block 2 of a cluster of 2"),
    ],
)
def test_each_mistake_shows(emulated: Path, bug: str, says: str, seed: str) -> None:
    done = run(emulated, bug, seed)
    assert done.returncode != 0
    assert re.search(says, done.stdout + done.stderr), done.stdout + done.stderr


@pytest.mark.slow
def test_compiles_for_sm_90a(tmp_path: Path) -> None:
    command = [need_nvcc(), "-std=c++17", "-I", PLUGINS, *SM90A, "-c", SOURCE, "-o", tmp_path / "cluster.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "serialized" not in done.stdout + done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("what", ["none", "refused"])
def test_gpu_agrees_with_the_emulator(tmp_path: Path, what: str) -> None:
    """Kernel and emulator follow one reading of the PTX ISA: only a GPU can say that it is right."""
    need_gpu()
    import torch

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma is of compute capability 9.0 alone")
    program = tmp_path / "cluster"
    subprocess.run([need_nvcc(), "-std=c++17", "-I", PLUGINS, *SM90A, SOURCE, "-o", program], check=True)
    done = run(program, what)
    assert done.returncode == 0, done.stdout + done.stderr
