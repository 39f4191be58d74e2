"""The emulator runs right kernels right, and catches each kind of mistake planted in a wrong one."""

import os
import subprocess
from pathlib import Path

import pytest
from native import PLUGINS, compiled, need_gpu, need_nvcc

HERE = Path(__file__).parent / "emulator"
SEEDS = ("0", *(pytest.param(seed, marks=pytest.mark.slow) for seed in "12"))
RIGHT = (
    *("gemm", "sum", "halves", "match", "rotate", "take", "pairs", "chain", "skip", "clear"),
    *("mxfp4", "mxfp4_blocks", "too_many_threads"),
)


@pytest.fixture(scope="module")
def right_kernels() -> Path:
    return compiled("emulator_check", sanitize=True)


@pytest.fixture(scope="module")
def wrong_kernels() -> Path:
    return compiled("emulator_bugs")


def run(program: Path, kernel: str, seed: str = "0") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LLMEXPORT_EMULATOR_SEED": seed}
    return subprocess.run([program, kernel], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kernel", RIGHT)
def test_right_kernel_is_right_under_sanitizers(right_kernels: Path, kernel: str, seed: str) -> None:
    done = run(right_kernels, kernel, seed)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", RIGHT)
def test_gpu_agrees_with_the_emulator(tmp_path: Path, kernel: str) -> None:
    """One reading of the fragment layouts serves kernel and emulator: only a GPU can say that it is right."""
    need_gpu()
    program = tmp_path / "check"
    command = [need_nvcc(), "-std=c++17", "-arch=native", "-I", PLUGINS, HERE / "check.cu", "-o", program]
    subprocess.run(command, check=True)
    done = run(program, kernel)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "kernel",
    [
        pytest.param("gemm", id="missing-cp.async-wait"),
        pytest.param("sum", id="missing-barrier"),
        pytest.param("pairs", id="missing-barrier-of-warps"),
        pytest.param("rotate", id="shared-memory-race"),
        pytest.param("take", id="missing-barrier-after-work"),
        pytest.param("chain", id="read-before-the-wait-for-the-kernel-before"),
        pytest.param("clear", id="write-before-that-wait"),
        pytest.param("skip", id="next-kernel-let-start-before-that-wait"),
    ],
)
def test_missing_synchronisation_gives_wrong_numbers(wrong_kernels: Path, kernel: str, seed: str) -> None:
    assert "WRONG NUMBERS" in run(wrong_kernels, kernel, seed).stdout


@pytest.mark.parametrize(
    ("kernel", "says"),
    [
        ("out_of_bounds", "heap-buffer-overflow"),
        ("past_shared_end", "out of bounds for type 'float [16]'"),
        ("misaligned", "requires 16 byte alignment"),
        ("divergent_shuffle", "deadlock: 16 of 32 threads wait, the first, (0,0,0), for __shfl_xor_sync"),
        ("divergent_barrier", "divergent __syncthreads: threads wait at line"),
        ("two_sizes", "threads, and elsewhere of"),
        ("too_few", "deadlock: 64 of 96 threads wait, the first, (0,0,0), for bar.sync"),
        ("ends_unwaited", "thread (31,0,0) of an early launch ends without waitForPrevious()"),
        ("too_much_shared", "101380 bytes of shared memory, 101376 of them dynamic, where a block may have 101376"),
    ],
)
def test_misuse_ends_with_a_message(right_kernels: Path, kernel: str, says: str) -> None:
    done = run(right_kernels, kernel)
    assert done.returncode != 0
    assert says in done.stderr
