"""What was measured, as one self-contained page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

TEMPLATE = Path(__file__).with_name("bench.html")
# What is plotted: key of a row, title, unit, factor, and whether less is better.
PLOTTED = (
    ("first", "time to the first token", "ms", 1e3, True),
    ("tokens_per_second", "decode, tokens a second", "", 1.0, False),
    ("peak", "peak memory of the process", "MB", 1e-6, True),
)


def page(found: Mapping[str, Any]) -> str:
    """`found` is a Bench as data. Whatever it quotes is text in the page, and nothing else."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    timed = [row for row in found["rows"] if row["first"] is not None]
    panels = []
    for key, title, unit, factor, less in PLOTTED if timed else ():
        values = [row[key] * factor for row in timed]
        most = max(values)
        bars = [
            (row["runner"], f"{v:.4g} {unit}".strip(), 100 * v / most) for row, v in zip(timed, values, strict=True)
        ]
        panels.append((title, "less is better" if less else "more is better", bars))
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(found, panels=panels)
