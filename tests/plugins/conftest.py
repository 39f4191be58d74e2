"""The plugin library on the machines that can run it: emulated on the CPU, and real on a GPU."""

import os
from pathlib import Path

import pytest
from native import SANITIZED, emulated_library
from plugin_host import CpuMemory, GpuMemory, Library, Machine

SANITIZE = bool(os.environ.get("LLMEXPORT_TEST_SANITIZED"))


def gpu_library(build_dir: Path) -> Path:
    import torch

    from llmexport.plugins import library

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    major, minor = torch.cuda.get_device_capability()
    return library.build([str(10 * major + minor)], build_dir)


@pytest.fixture(scope="session", params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    if request.param == "gpu":
        return Machine(Library(gpu_library(tmp_path_factory.mktemp("plugins"))), GpuMemory)
    return Machine(Library(emulated_library(SANITIZED if SANITIZE else ())), CpuMemory)
