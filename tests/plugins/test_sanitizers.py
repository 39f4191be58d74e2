"""test_kernels.py once more, kernels and plugin classes compiled with ASan and UBSan, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

from native import SANITIZED, emulated_library

HERE = Path(__file__).parent


def test_kernels_under_sanitizers() -> None:
    emulated_library(SANITIZED)
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime.stdout.strip(),
        # Python and numpy leave memory to the end of the process.
        "ASAN_OPTIONS": "detect_leaks=0",
        "LLMEXPORT_TEST_SANITIZED": "1",
        "LLMEXPORT_EMULATOR_SEED": "7",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not gpu"]
    done = subprocess.run(
        [*command, HERE / "test_kernels.py"], env=environment, cwd=HERE, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "passed" in done.stdout
