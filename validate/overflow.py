"""Where numbers stop being finite, or are near it: the first step that makes a NaN, an infinity, or in float16 a number
that is too large for comfort, and what a report says of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from llmexport.export.spec import Assembly
from llmexport.validate.report import Rung

MOST = 65504  # the largest number of float16


def first_step(assembly: Assembly, values: Mapping[str, np.ndarray]) -> str | None:
    """The first step with an output that is not finite although all that it reads is; `values` are by value name."""

    def finite(names: Iterable[str]) -> bool:
        return all(np.isfinite(values[n]).all() for n in names)

    return next((s.name for s in assembly.steps if not finite(s.outputs) and finite(s.inputs)), None)


def largest(assembly: Assembly, values: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The largest magnitude that each step makes, but for masks and biases, which are as large as can be; infinite for
    a NaN."""
    found: dict[str, float] = {}
    for step in assembly.steps if values else ():
        ports = zip(step.outputs, step.block.outputs, strict=True)
        made = [values[n] for n, p in ports if p.use not in ("mask", "bias")]
        floats = [np.abs(a).max() for a in made if a.size and a.dtype.kind == "f"]
        if floats:
            found[step.name] = max(float(x) if np.isfinite(x) else math.inf for x in floats)
    return found


def near(largest: Mapping[str, float]) -> str:
    """What is to be said where a float16 export makes numbers of these magnitudes, by step in order; or nothing."""
    step = next((s for s, x in largest.items() if x > MOST / 2), None)
    if step is None:
        return ""
    if math.isinf(largest[step]):
        return f"{step} overflows float16: use bfloat16"
    said = f"{step} makes {largest[step]:.0f}, over half of the {MOST} that float16 holds"
    return f"{said}: other input may overflow, use bfloat16"


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
