"""What a validation found, and the files that say so beside the model: `report.json` and `report.html`."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from llmexport.export.exported import Export
from llmexport.export.output import write_files
from llmexport.export.values import finite, visible
from llmexport.validate.compare import Difference
from llmexport.validate.tolerance import Tolerance

REFERENCE = "PyTorch / transformers"  # the rung against code that nobody here wrote
TIMED = ("prefill", "decode")  # the second by models that have decode steps
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem }
table { border-collapse: collapse; margin: .5rem 0 1.5rem } td, th { padding: .2rem .8rem; text-align: left }
th, tr { border-bottom: 1px solid #ddd } .pass { color: #07701f } .fail { color: #b00020; font-weight: bold }
.not { color: #666 } summary { cursor: pointer } td { font-variant-numeric: tabular-nums }
"""


@dataclass
class Rung:
    """One comparison; `difference` is the worst of its `details`.

    `status` is pass, fail or not run; `note` says why a rung was not run, or what it lacks; `key` is the name that
    users choose it by.
    """

    name: str
    status: str
    note: str = ""
    difference: Difference | None = None
    tolerance: Tolerance | None = None
    details: list[dict[str, Any]] = field(default_factory=list)
    key: str = ""


@dataclass
class Report:
    """All rungs, in order, and how long the runners took.

    seconds: by runner, the medians of `prefill` (further calls of the prompt, once all stages have been run) and of
    `decode` (the decode steps, one call each): of PyTorch the time in its modules, of ONNX Runtime that in `run`.
    prompt: the sizes of what was run. weights: how much of them was read to tell that they are those exported.
    asked: the rungs that the user chose; none if all were to be run that can.
    """

    rungs: list[Rung]
    seconds: dict[str, dict[str, float]]
    prompt: dict[str, Any]
    weights: str = ""
    asked: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """No rung failed, at least one was run, and none that the user chose was not."""
        ran = [r for r in self.rungs if r.status != "not run"]
        left = [r for r in self.rungs if r.status == "not run" and r.key in self.asked]
        return bool(ran) and not left and all(r.status == "pass" for r in ran)

    @property
    def verdict(self) -> str:
        """One line for people, which does not claim more than was run."""
        if not self.passed:
            return "not proven: see the rungs"
        compared = any(r.name.startswith(REFERENCE) and r.status == "pass" for r in self.rungs)
        return "every rung that was run passed" + ("" if compared else "; not compared with transformers")

    def as_data(self) -> dict[str, Any]:
        """JSON data, in which a number that is not finite is text."""
        return finite(asdict(self) | {"passed": self.passed, "verdict": self.verdict})


def write(export: Export, report: Report) -> None:
    """Writes both files into the export's folder, replacing earlier ones."""
    data = {"model": _model(export), **report.as_data()}
    files = {"report.json": json.dumps(data, indent=1), "report.html": page(export, report)}
    write_files(export.folder, {n: t.encode() for n, t in files.items()})


def page(export: Export, report: Report) -> str:
    """The report as one self-contained HTML page."""
    model = _model(export)
    rows = [(r.name, *_error(r), r.status, r.note) for r in report.rungs]
    times = [(runner, *(_milliseconds(taken, k) for k in TIMED)) for runner, taken in report.seconds.items()]
    details = "".join(
        f"<details><summary>{_text(r.name)}: {len(r.details)} comparisons</summary>{_details(r)}</details>"
        for r in report.rungs
        if r.details
    )
    return (
        f"<!doctype html><meta charset=utf-8><title>llmexport: {_text(model['arch'])}</title>"
        f"<style>{STYLE}</style><h1>{_text(model['arch'])}, {_text(model['dtype'])}</h1>"
        f"<p class={'pass' if report.passed else 'fail'}>{report.verdict}</p>"
        + _table(("rung", "max abs", "rms ratio", "allowed", "status", "note"), rows)
        + (_table(("runner, warm", "prefill", "decode step"), times) if times else "")
        + details
        + _table(("what", ""), [(k, str(v)) for k, v in model.items()] + [("weights read", report.weights)])
    )


def _milliseconds(seconds: Mapping[str, float], name: str) -> str:
    return f"{seconds[name] * 1e3:.2f} ms" if name in seconds else ""


def _text(said: object) -> str:
    return html.escape(visible(str(said)))


def _model(export: Export) -> dict[str, Any]:
    said = {name: getattr(export, name) for name in ("arch", "block", "dtype", "opset", "versions")}
    return said | {"ops": {g.name: g.ops for g in export.graphs}}


def _error(rung: Rung) -> tuple[str, str, str]:
    if rung.difference is None or rung.tolerance is None:
        return "", "", ""
    return f"{rung.difference.max_abs:.2e}", f"{rung.difference.rms_ratio:.2e}", rung.tolerance.text


def _details(rung: Rung) -> str:
    names = [k for k in rung.details[0] if k not in ("difference", "allowed")]
    rows = [
        (*(str(d[n]) for n in names), f"{d['difference'].max_abs:.2e}", f"{d['difference'].rms_ratio:.2e}")
        for d in rung.details
    ]
    return _table((*names, "max abs", "rms ratio"), rows)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(c)}" for c in columns)
    body = "".join("<tr>" + "".join(_cell(c) for c in row) for row in rows)
    return f"<table><tr>{head}{body}</table>"


def _cell(text: str) -> str:
    mark = f" class={text.split()[0]}" if text in ("pass", "fail", "not run") else ""
    return f"<td{mark}>{_text(text)}"
