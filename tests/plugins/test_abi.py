"""plugins/trt/interface.h and registry.h against NVIDIA's own headers, where they are at hand."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CUDA_INCLUDE = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
INCLUDE_DIRS = [Path(p) for p in os.environ.get("TENSORRT_INCLUDE_DIR", "").split(os.pathsep) if p]


@pytest.mark.skipif(not INCLUDE_DIRS, reason="TENSORRT_INCLUDE_DIR names no folder with NvInferRuntime.h")
@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
@pytest.mark.parametrize("include", INCLUDE_DIRS, ids=str)
def test_interface_is_nvidias(include: Path, tmp_path: Path) -> None:
    """Vtable slots, signatures, enumerators, sizes, offsets, interface names. Several folders: separate with `:`."""
    program = tmp_path / "abi"
    headers = ["-I", HERE.parents[1] / "plugins", "-isystem", include, "-isystem", CUDA_INCLUDE]
    # -w: NVIDIA's headers deprecate their own names.
    subprocess.run(["g++", "-std=c++17", "-w", *headers, HERE / "abi.cpp", "-o", program], check=True)
    found = subprocess.run([program], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    assert "155 facts agree, 0 differ" in found.stdout
