"""llmexport validate"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from llmexport.export.cli.console import Console, talkative
from llmexport.export.cli.source import FOLDER

if TYPE_CHECKING:
    from llmexport.validate.ladder import Report


@click.command("validate")
@click.argument("folder", type=FOLDER)
@click.option("--tokens", type=click.IntRange(2), help="Length of the prompt; default: past every window.")
@click.option("--seed", type=int, default=0, show_default=True)
@talkative
def command(folder: Path, tokens: int | None, seed: int, quiet: bool, as_json: bool) -> int:
    """Compare an export with PyTorch, block by block and whole, prefill and decode.

    Writes report.json and report.html into FOLDER. Exit code 1 if a rung fails.
    """
    console = Console(quiet, as_json)
    report = run(folder, tokens, seed, console)
    show(report, console)
    console.result(report.as_data())
    return 0 if report.passed else 1


def run(folder: Path, tokens: int | None, seed: int, console: Console) -> Report:
    """The report on the export in `folder`, also written there."""
    from llmexport.export import manifest
    from llmexport.validate import ladder, report_files

    found = manifest.read(folder)
    made = ladder.climb(found, tokens=tokens, seed=seed, progress=console.progress)
    report_files.write(found, made)
    return made


def show(report: Report, console: Console) -> None:
    rows = []
    for rung in report.rungs:
        error = ("", "", "")
        if rung.difference and rung.tolerance:
            worst = rung.difference
            error = (f"{worst.max_abs:.1e}", f"{worst.rms_ratio:.1e}", rung.tolerance.text)
        rows.append((rung.name, *error, rung.status + (f": {rung.note}" if rung.note else "")))
    console.table("error at every rung", ("rung", "max abs", "rms ratio", "allowed", ""), rows)
    times = [(n, f"{s['prefill'] * 1e3:.1f} ms", f"{s['decode'] * 1e3:.2f} ms") for n, s in report.seconds.items()]
    if times:
        prompt = report.prompt
        title = f"time of a step: batch {prompt['batch']}, prompt of {prompt['tokens']} tokens, this CPU"
        console.table(title, ("runner", "prefill", "decode"), times)
