"""llmexport bench"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llmexport.export.cli.console import Console, size, talkative
from llmexport.export.cli.folder import FOLDER
from llmexport.run.errors import RunError

if TYPE_CHECKING:
    from llmexport.run.bench import Bench


@click.command("bench")
@click.argument("folder", type=FOLDER)
@click.option("--prompt-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--new-tokens", type=click.IntRange(2), default=64, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Prompts at once.")
@click.option("--runs", type=click.IntRange(1), default=5, show_default=True, help="After one to warm up.")
@click.option("--threads", type=click.IntRange(1), help="Default: one a core.")
@click.option("-o", "--output", type=FOLDER, help="An existing folder for bench.json and bench.html; default: FOLDER.")
@talkative
def command(
    folder: Path,
    prompt_tokens: int,
    new_tokens: int,
    batch: int,
    runs: int,
    threads: int | None,
    output: Path | None,
    quiet: bool,
    as_json: bool,
) -> int:
    """Time an export beside PyTorch: to the first token, each further one, and memory.

    Each runner has a process of its own. Exit code 1 if one chooses other tokens than PyTorch: it gets no time.
    """
    from llmexport.run.bench import bench, write

    console = Console(quiet, as_json)
    target = output or folder
    if output and not output.is_dir():
        raise RunError(f"{output} is not a folder: make it first")
    if target.is_dir() and not os.access(target, os.W_OK):
        raise RunError(f"{target} cannot be written to, and what is measured belongs there: name a folder with -o")
    found = bench(
        folder,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch=batch,
        runs=runs,
        threads=threads,
        progress=console.progress,
    )
    write(found, target)
    console.table(
        f"{found.arch}, {found.dtype}: {batch} x {prompt_tokens} tokens, {new_tokens} more, medians of {runs} runs, "
        f"{found.threads} threads",
        ("runner", "first token", "decode", "peak memory", "note"),
        rows(found),
    )
    console.result(found.as_data())
    return 0 if found.right else 1


def rows(found: Bench) -> list[tuple[str, ...]]:
    """Rows for people."""
    shown: list[tuple[str, ...]] = []
    for row in found.rows:
        if row.first is None or row.peak is None:
            shown.append((row.runner, "", "", "", row.note))
        else:
            speed = f"{row.tokens_per_second:.1f} tokens/s"
            shown.append((row.runner, f"{row.first * 1e3:.1f} ms", speed, size(row.peak), row.note))
    return shown
