"""The kernels' tests once more, kernels and plugin classes compiled with ASan and UBSan, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from native import emulated_library

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("file", sorted(p.name for p in HERE.glob("test_*kernel*.py")))
def test_kernels_under_sanitizers(file: str) -> None:
    emulated_library(sanitize=True)
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
    done = subprocess.run([*command, HERE / file], env=environment, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "passed" in done.stdout
