"""llmexport validate"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from llmexport.export.cli.console import Console, talkative
from llmexport.export.cli.folder import FOLDER, verifying
from llmexport.validate import validate

if TYPE_CHECKING:
    from llmexport.validate.report import Report

ENGINE = "engine"  # the runner that is on a GPU


@click.command("validate")
@click.argument("folder", type=FOLDER, required=False)
@click.option(
    "--tokens", type=click.IntRange(2), help="Length of the prompt; default: past every window of up to 500 tokens."
)
@click.option("--seed", type=click.IntRange(0), help="Of the prompt and of what is drawn beside it; default: 0.")
@click.option(
    "--rungs",
    help="Those to run, as in transformers,blocks; default: every one that can run here.",
)
@click.option("--bisect", is_flag=True, help="Name the first block, then the first node, that leaves tolerance.")
@click.option(
    "--golden", type=FOLDER, help="A pack of `llmexport golden`, to compare FOLDER's ONNX files or an engine with."
)
@click.option(
    "--engine", type=FOLDER, help="In place of FOLDER: the folder of an engine, where no torch is. Needs --golden."
)
@click.option(
    "--reference", type=FOLDER, help="The checkpoint that was quantised, to tell how far that moved the logits."
)
@click.option(
    "--save-results", type=FOLDER, help="A file for the outputs of all runners, which `polygraphy inspect data` reads."
)
@verifying
@talkative
def command(
    folder: Path | None,
    tokens: int | None,
    seed: int | None,
    rungs: str | None,
    bisect: bool,
    golden: Path | None,
    engine: Path | None,
    reference: Path | None,
    save_results: Path | None,
    verify: bool,
    quiet: bool,
    as_json: bool,
) -> int:
    """Compare an export with PyTorch, block by block and whole, prefill and decode.

    Writes report.json and report.html into FOLDER, but with --golden. Exit code 1 if a rung fails.
    """
    given = engine or folder
    if given is None or (engine and folder):
        raise click.UsageError("give one of FOLDER and --engine", click.get_current_context())
    if engine and not golden:
        raise click.UsageError("--engine needs --golden, a pack of `llmexport golden`", click.get_current_context())
    if golden and (tokens or seed is not None or rungs or bisect or reference or verify):
        said = "--golden brings its own prompt and rung: leave out --tokens, --seed, --rungs, --bisect, --reference "
        said += "and --verify"
        raise click.UsageError(said, click.get_current_context())
    console = Console(quiet, as_json)
    if golden:
        from llmexport.validate import deployed

        replay = deployed.on_engine if engine else deployed.on_onnx_runtime
        report = replay(given, golden, save=save_results, progress=console.progress)
    else:
        names = None if rungs is None else [n.strip() for n in rungs.split(",")]
        report = validate(
            folder or "",
            rungs=names,
            tokens=tokens,
            seed=seed or 0,
            save_results=save_results,
            verify=verify,
            bisect=bisect,
            reference=reference,
            progress=console.progress,
        )
    console.table(f"validation of {given}", (), summary(report))
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
        if rung.metrics:
            rows.append(("", rung.metrics.text))
    rows += report.bisect.lines if report.bisect else []
    rows += [("warning", report.warning)] if report.warning else []
    rows += [("moved by quantisation", report.moved.text)] if report.moved else []
    for runner, seconds in report.seconds.items():
        prompt = report.prompt
        shown = f", {prompt['pictures']} pictures among them," if "pictures" in prompt else ""
        text = f"prompt of {prompt['batch']} x {prompt['tokens']} tokens{shown} {seconds['prefill'] * 1e3:.1f} ms, "
        # A model that carries nothing decodes nothing.
        text += f"decode {seconds['decode'] * 1e3:.2f} ms, " if "decode" in seconds else ""
        where = "this GPU, with copies to and from it" if runner == ENGINE else "this CPU"
        rows.append((f"time, {runner}", f"{text}warm, {where}"))
    return [*rows, ("verdict", report.verdict)]
