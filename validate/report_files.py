"""`report.json` and `report.html` beside the model that they speak of."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from typing import Any

from llmexport.export.manifest import Manifest
from llmexport.export.output import write_files
from llmexport.validate.ladder import Report, Rung

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem }
table { border-collapse: collapse; margin: .5rem 0 1.5rem } td, th { padding: .2rem .8rem; text-align: left }
th, tr { border-bottom: 1px solid #ddd } .pass { color: #07701f } .fail { color: #b00020; font-weight: bold }
.not { color: #666 } summary { cursor: pointer } td { font-variant-numeric: tabular-nums }
"""


def write(manifest: Manifest, report: Report) -> None:
    """Writes both files into the export's folder, replacing earlier ones."""
    data = {"model": _model(manifest), **report.as_data()}
    files = {"report.json": json.dumps(data, indent=1), "report.html": page(manifest, report)}
    write_files(manifest.folder, {n: t.encode() for n, t in files.items()})


def page(manifest: Manifest, report: Report) -> str:
    """The report as one self-contained HTML page."""
    model = _model(manifest)
    verdict = "every rung that was run passed" if report.passed else "not proven: see the rungs"
    rows = [(r.name, *_error(r), r.status, r.note) for r in report.rungs]
    times = [(n, *(f"{s[k] * 1e3:.2f} ms" for k in ("prefill", "decode"))) for n, s in report.seconds.items()]
    details = "".join(
        f"<details><summary>{html.escape(r.name)}: {len(r.details)} comparisons</summary>{_details(r)}</details>"
        for r in report.rungs
        if r.details
    )
    return (
        f"<!doctype html><meta charset=utf-8><title>llmexport: {html.escape(model['arch'])}</title>"
        f"<style>{STYLE}</style><h1>{html.escape(model['arch'])}, {model['dtype']}</h1>"
        f"<p class={'pass' if report.passed else 'fail'}>{verdict}</p>"
        + _table(("rung", "max abs", "rms ratio", "allowed", "status", "note"), rows)
        + (_table(("runner", "prefill", "decode step"), times) if times else "")
        + details
        + _table(("what", ""), [(k, str(v)) for k, v in model.items()])
    )


def _model(manifest: Manifest) -> dict[str, Any]:
    keys = ("arch", "block", "dtype", "opset", "ops", "versions")
    return {k: manifest.data[k] for k in keys}


def _error(rung: Rung) -> tuple[str, str, str]:
    if rung.difference is None or rung.tolerance is None:
        return "", "", ""
    return f"{rung.difference.max_abs:.2e}", f"{rung.difference.rms_ratio:.2e}", rung.tolerance.text


def _details(rung: Rung) -> str:
    names = [k for k in rung.details[0] if k not in ("difference", "same_tokens")]
    rows = [
        (*(str(d[n]) for n in names), f"{d['difference'].max_abs:.2e}", f"{d['difference'].rms_ratio:.2e}")
        for d in rung.details
    ]
    return _table((*names, "max abs", "rms ratio"), rows)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(c)}" for c in columns)
    body = "".join("<tr>" + "".join(_cell(c) for c in row) for row in rows)
    return f"<table><tr>{head}{body}</table>"


def _cell(text: str) -> str:
    mark = f" class={text.split()[0]}" if text in ("pass", "fail", "not run") else ""
    return f"<td{mark}>{html.escape(text)}"
