"""What tests of the benchmarks' cases share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from native import emulated_library
from plugin_cases import array_of
from plugin_host import computed
from plugin_memory import CpuMemory

from llmexport.plugins.host import Library

Compute = Callable[[Any, list[torch.Tensor], list[torch.Tensor]], None]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """bench_ops.py; what lies beside it can be imported."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import bench_ops

    return bench_ops


@pytest.fixture
def compute() -> Compute:
    """Computes a case's outputs by its plugin, on the emulator."""
    library = Library(emulated_library())

    def given(case: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        plugin = library.create(case.op, case.attributes).attach()
        found = computed(plugin, CpuMemory(), [array_of(x) for x in inputs])
        for output, its in zip(outputs, found, strict=True):
            array_of(output)[...] = its

    return given
