"""The rungs of a report that every machine has."""

from __future__ import annotations

from llmexport.validate.report import Report, Rung

ELSEWHERE = {"engine"}  # by key: where a GPU and an engine are


def everywhere(report: Report) -> list[Rung]:
    return [r for r in report.rungs if r.key not in ELSEWHERE]
