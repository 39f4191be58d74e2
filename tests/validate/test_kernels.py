"""The rung of our kernels, on the CPU emulator: a right export passes, and a wrong kernel is found and named."""

from __future__ import annotations

import time

import pytest
from arch_cases import FIRST, Case
from native import emulated_library

from llmexport.export import manifest
from llmexport.plugins import emulated
from llmexport.validate import ladder


@pytest.fixture(autouse=True)
def emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulated, "find", emulated_library)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", FIRST, ids=str)
def test_every_op_by_its_kernel_gives_the_models_numbers(case: Case, dtype: str, exported) -> None:
    folder = exported(case, dtype)
    start = time.perf_counter()
    report = ladder.climb(manifest.read(folder), rungs=["kernels"], tokens=None)
    [r] = report.rungs
    print(
        "FIG",
        case.name,
        dtype,
        r.status,
        f"{time.perf_counter() - start:.1f}s",
        r.difference and (r.difference.max_abs, r.difference.rms_ratio),
        r.tolerance and r.tolerance.text,
        report.seconds,
        r.note,
    )
