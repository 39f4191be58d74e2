"""A report as one self-contained page for people: no script, no request, light and dark, narrow and wide."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from llmexport.export.exported import Export
from llmexport.export.output import write_files
from llmexport.export.values import finite, visible
from llmexport.validate import overflow, plot
from llmexport.validate.facts import facts
from llmexport.validate.report import Report, Rung

TEMPLATE = Path(__file__).with_name("page.html")
SIZES = "kMGT"


def write(export: Export, report: Report) -> None:
    """Writes `report.json` and `report.html` into the export's folder, replacing earlier ones."""
    said = facts(export)
    files = {"report.json": json.dumps(finite(said | report.as_data()), indent=1), "report.html": page(said, report)}
    write_files(export.folder, {n: t.encode() for n, t in files.items()})


def page(said: Mapping[str, Any], report: Report) -> str:
    """`said` is what `facts` gives. Whatever it or the report quotes is text in the page, and nothing else."""
    rungs = [(rung, plot.plot(rung) if rung.details else None) for rung in report.rungs]
    shown = {"map": plot.block_map(report.rungs), "height": plot.HEIGHT, "most": overflow.MOST}
    return _template().render(said, report=report, rungs=rungs, first=first_over(report), **shown)


def first_over(report: Report) -> str:
    """The first comparison beyond its tolerance, of the first rung that failed; nothing if none is."""
    for rung in report.rungs:
        for detail in rung.details if rung.status == "fail" else ():
            if plot.used(detail) > 1:
                return f"{rung.name}: first over in {plot.place(detail)}, {where(detail)}"
    return ""


def where(detail: Mapping[str, Any]) -> str:
    """The run of a block and the output."""
    return ", ".join(str(detail[n]) for n in ("run", "output") if n in detail)


def share(used: float) -> str:
    """The share of a tolerance that was used, for people."""
    if not math.isfinite(used):
        return "not finite"
    percent = 100 * used
    if percent >= 1000:
        return f"{used:,.0f} times"
    if 0 < percent < 0.1:
        return "under 0.1%"
    return f"{percent:.1f}%" if 0 < percent < 10 else f"{percent:.0f}%"


def margin(rung: Rung) -> float | None:
    """The share of its tolerance that a rung used at most."""
    return rung.difference.excess(rung.tolerance) if rung.difference and rung.tolerance else None


def size(nbytes: float) -> str:
    power = min((len(str(int(nbytes))) - 1) // 3, len(SIZES))
    return f"{nbytes / 1000**power:.1f} {SIZES[power - 1]}B" if power else f"{nbytes:.0f} B"


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"


def counts(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {what}" for what, n in numbers.items()) or "none"


def by_reason(refused: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """The nodes that a pass left, by its reason."""
    found: dict[str, list[str]] = {}
    for node, reason in refused:
        found.setdefault(reason, []).append(node)
    return found


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True,
        # What a file says may turn the direction of writing, and more.
        finalize=lambda said: said if isinstance(said, Markup) else visible(str(said)),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    tools = (share, margin, size, duration, counts, by_reason, where, plot.used, plot.place, plot.shade)
    environment.globals |= {tool.__name__: tool for tool in tools}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
