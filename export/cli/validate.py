"""llmexport validate"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from llmexport.export.cli.console import Console, talkative
from llmexport.export.cli.source import FOLDER, verifying
from llmexport.validate import validate

if TYPE_CHECKING:
    from llmexport.validate.report import Report


@click.command("validate")
@click.argument("folder", type=FOLDER)
@click.option(
    "--tokens", type=click.IntRange(2), help="Length of the prompt; default: past every window of up to 500 tokens."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--rungs",
    help="Those to run, as in transformers,blocks; default: every one that can run here.",
)
@verifying
@talkative
def command(
    folder: Path, tokens: int | None, seed: int, rungs: str | None, verify: bool, quiet: bool, as_json: bool
) -> int:
    """Compare an export with PyTorch, block by block and whole, prefill and decode.

    Writes report.json and report.html into FOLDER. Exit code 1 if a rung fails.
    """
    console = Console(quiet, as_json)
    names = None if rungs is None else [n.strip() for n in rungs.split(",")]
    report = validate(folder, rungs=names, tokens=tokens, seed=seed, verify=verify, progress=console.progress)
    console.table(f"validation of {folder}", (), summary(report))
    console.result(report.as_data())
    return 0 if report.passed else 1


def summary(report: Report) -> list[tuple[str, str]]:
    """Rows of the error at every rung and of the time of a step."""
    rows = [("weights read", report.weights)]
    for rung in report.rungs:
        text = rung.status
        if rung.difference and rung.tolerance:
            worst = rung.difference
            text += f": {worst.max_abs:.1e} max abs, {worst.rms_ratio:.1e} rms ratio (allowed {rung.tolerance.text})"
        rows.append((rung.name, f"{text}: {rung.note}" if rung.note else text))
    for runner, seconds in report.seconds.items():
        prompt = report.prompt
        text = f"prompt of {prompt['batch']} x {prompt['tokens']} tokens {seconds['prefill'] * 1e3:.1f} ms, "
        # A model that carries nothing decodes nothing.
        text += f"decode {seconds['decode'] * 1e3:.2f} ms, " if "decode" in seconds else ""
        rows.append((f"time, {runner}", text + "warm, this CPU"))
    return [*rows, ("verdict", report.verdict)]
