"""llmexport golden"""

from __future__ import annotations

from pathlib import Path

import click

from llmexport.export.cli.console import Console, size, talkative
from llmexport.export.cli.folder import FOLDER


@click.command("golden")
@click.argument("folder", type=FOLDER)
@click.option(
    "--tokens", type=click.IntRange(2), help="Length of the prompt; default: past every window of up to 500 tokens."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--force", is_flag=True, help="Replace an earlier pack.")
@click.option("-o", "--output", type=FOLDER, required=True, help="The file to make, as in pack.npz.")
@talkative
def command(folder: Path, tokens: int | None, seed: int, force: bool, output: Path, quiet: bool, as_json: bool) -> None:
    """Write what an export is fed, and what it must give, for `validate --golden` where neither torch nor it is.

    All stages of `validate`: prompt, decode steps, steps across thresholds, of which the random pasts may take 1 GiB.
    """
    console = Console(quiet, as_json)
    from llmexport.export import manifest
    from llmexport.validate import check_memory, golden

    check_memory(tokens or 0)
    export = manifest.read(folder)
    header = golden.make(export, output, tokens=tokens, seed=seed, force=force, progress=console.progress)
    export.check_untouched()
    rows = [
        ("pack", f"{output}, {size(output.stat().st_size)}"),
        ("stages", ", ".join(s.name for s in header.stages)),
        ("left out", ", ".join(header.left_out) or "none"),
        ("outputs by", header.reference),
    ]
    console.table(f"golden pack of {folder}", (), rows)
    about = {name: getattr(header, name) for name in ("llmexport", "arch", "dtype", "seed", "reference", "left_out")}
    stages = [s.name for s in header.stages]
    console.result({"file": str(output), "bytes": output.stat().st_size, **about, "stages": stages})
