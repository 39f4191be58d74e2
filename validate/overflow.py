"""Where numbers stop being finite: the first step that makes a NaN or an infinity, and what a report says of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from llmexport.export.spec import Assembly
from llmexport.validate.report import Rung


def first_step(assembly: Assembly, values: Mapping[str, np.ndarray]) -> str | None:
    """The first step with an output that is not finite although all that it reads is; `values` are by value name."""

    def finite(names: Iterable[str]) -> bool:
        return all(np.isfinite(values[n]).all() for n in names)

    return next((s.name for s in assembly.steps if not finite(s.outputs) and finite(s.inputs)), None)


def first_alone(rung: Rung) -> str | None:
    """The first step of a rung over single steps whose comparison is not finite."""
    return next((d["step"] for d in rung.details if not math.isfinite(d["difference"].max_abs)), None)


def explain(rungs: Iterable[Rung], dtype: str, step: str | None) -> None:
    """Adds to the note of every rung that compared a number that is not finite that `step` made the first."""
    said = (
        f"overflows float16 in {step}, use bfloat16"
        if dtype == "float16"
        else f"{step} gives numbers that are not finite"
    )
    for rung in rungs:
        if step and rung.difference and not math.isfinite(rung.difference.max_abs):
            rung.note = f"{rung.note}; {said}" if rung.note else said
