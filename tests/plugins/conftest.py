"""The plugin library on the machines that can run it: emulated on the CPU, and real on a GPU."""

import ctypes
from collections import defaultdict
from collections.abc import Callable, Iterator

import pytest
from native import SANITIZE, emulated_library, gpu_library
from plugin_host import Machine
from plugin_memory import CpuMemory, GpuMemory

from llmexport.plugins.host import Library

SANITIZED_CASES = 5  # of each test, spread over all that it has: the sanitizers take ten times as long


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not SANITIZE:
        return
    cases = defaultdict(list)
    for item in items:
        if not item.get_closest_marker("gpu"):
            cases[item.nodeid.partition("[")[0]].append(item)
    kept = {c for found in cases.values() for c in found[:: -(-len(found) // SANITIZED_CASES)]}
    config.hook.pytest_deselected(items=[c for c in items if c not in kept])
    items[:] = [c for c in items if c in kept]


@pytest.fixture(scope="session", params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest) -> Machine:
    if request.param == "gpu":
        return Machine(Library(gpu_library()), GpuMemory)
    return Machine(Library(emulated_library()), CpuMemory)


@pytest.fixture(autouse=True)
def portable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test is of the kernels for every GPU, unless it asks for others."""
    monkeypatch.setenv("LLMEXPORT_SM90A", "0")


@pytest.fixture
def wgmma_count() -> Callable[[], int]:
    """How many the kernels of this process have finished, on the emulator."""
    library = ctypes.CDLL(str(emulated_library()))
    library.llmexportEmulatedWgmma.restype = ctypes.c_int64
    return lambda: int(library.llmexportEmulatedWgmma())


@pytest.fixture
def wgmmas(machine: Machine, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """Kernels use wgmma wherever they can, and the test's do; on the emulator, which counts."""
    monkeypatch.setenv("LLMEXPORT_SM90A", "1")
    if machine.memory is not CpuMemory:
        yield
        return
    count = request.getfixturevalue("wgmma_count")
    before = count()
    yield
    assert count() > before
