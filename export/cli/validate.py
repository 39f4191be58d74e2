"""llmexport validate"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llmexport.export.cli.console import Console, talkative
from llmexport.export.cli.source import FOLDER, verifying
from llmexport.export.errors import ExportError

if TYPE_CHECKING:
    from llmexport.validate.report import Report


@click.command("validate")
@click.argument("folder", type=FOLDER)
@click.option(
    "--tokens", type=click.IntRange(2), help="Length of the prompt; default: past every window of up to 500 tokens."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@verifying
@talkative
def command(folder: Path, tokens: int | None, seed: int, verify: bool, quiet: bool, as_json: bool) -> int:
    """Compare an export with PyTorch, block by block and whole, prefill and decode.

    Writes report.json and report.html into FOLDER. Exit code 1 if a rung fails.
    """
    console = Console(quiet, as_json)
    report = run(folder, tokens, seed, verify, console)
    console.table(f"validation of {folder}", (), summary(report))
    console.result(report.as_data())
    return 0 if report.passed else 1


def run(folder: Path, tokens: int | None, seed: int, verify: bool, console: Console) -> Report:
    """The report on the export in `folder`, also written there.

    The first one that passes adds digests of all bytes of the weights to the manifest.
    """
    from llmexport.export import manifest
    from llmexport.validate import ladder
    from llmexport.validate.report import write

    found = manifest.read(folder)
    if not os.access(folder, os.W_OK):
        raise ExportError(f"{folder} cannot be written to, and the report belongs there: copy the export elsewhere")
    _check_memory(tokens or 0)
    first = not manifest.has_digests(found)
    if first or verify:
        console.progress("read the weights", 0, 1)
        found = manifest.digested(found) if first else manifest.verified(found)
    made = ladder.climb(found, tokens=tokens, seed=seed, progress=console.progress)
    found.check_untouched()
    # Where a rung failed, nothing is recorded that later runs would trust.
    made.weights = (found if made.passed else dataclasses.replace(found, digested=False)).checked
    write(found, made)
    if made.passed and (first or verify):
        manifest.rewrite(manifest.restamp(found))
    return made


def _check_memory(tokens: int) -> None:
    """Raise ExportError on a prompt that would take the whole machine down before any error."""
    # Two rows, a score in fp32 of each token for each: less than one layer takes.
    least, there = 8 * tokens**2, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if least > there:
        raise ExportError(
            f"--tokens {tokens}: their attention takes {least / 1e9:.3g} GB or more, this machine has "
            f"{there / 1e9:.3g} GB: name fewer"
        )


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
        rows.append((f"time, {runner}", text + f"decode step {seconds['decode'] * 1e3:.2f} ms, this CPU"))
    return [*rows, ("verdict", report.verdict)]
