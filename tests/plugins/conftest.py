"""The plugin library on the machines that can run it: emulated on the CPU, and real on a GPU."""

import os

import pytest
from native import SANITIZED, emulated_library, gpu_library
from plugin_host import Library, Machine
from plugin_memory import CpuMemory, GpuMemory

SANITIZE = bool(os.environ.get("LLMEXPORT_TEST_SANITIZED"))


@pytest.fixture(scope="session", params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest) -> Machine:
    if request.param == "gpu":
        return Machine(Library(gpu_library()), GpuMemory)
    return Machine(Library(emulated_library(SANITIZED if SANITIZE else ())), CpuMemory)
