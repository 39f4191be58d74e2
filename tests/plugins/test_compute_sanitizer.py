"""Every op's kernels on a GPU under compute-sanitizer, at the small sizes of the plugins' cases and chains."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from native import need_gpu

LIFE = Path(__file__).parent / "test_plugin_life.py"
TESTS = "gpu and (numbers_are or two_streams)"
FOUND = 99  # the exit code


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_finds_nothing(tool: str) -> None:
    need_gpu()
    places = [os.environ.get("PATH", ""), f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"]
    sanitizer = shutil.which("compute-sanitizer", path=os.pathsep.join(places))
    if not sanitizer:
        pytest.skip("no compute-sanitizer: sudo apt install cuda-sanitizer-13-0")
    # Torch's caching allocator would hide what is read past the end of a tensor.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), "--target-processes", "application-only"]
    command += [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(LIFE), "-k", TESTS]
    done = subprocess.run(command, env=environment, cwd=LIFE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
