"""llmexport checkpoint"""

from __future__ import annotations

import json
from pathlib import Path

import click

from llmexport.export.cli.console import Console, size, talkative
from llmexport.export.cli.folder import FOLDER
from llmexport.export.cli.source import DTYPES, PARTS
from llmexport.export.errors import ExportError
from llmexport.plugins.regular import read_regular


@click.command("checkpoint")
@click.option("--arch", help="Architecture; default: what the config says.")
@click.option("--config", type=FOLDER, help="A config.json; default: the architecture's tiny one.")
@click.option("--dtype", type=DTYPES, default="bfloat16", show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--hollow", is_flag=True, help="Zeros that take no space on disk, for a model of any size.")
@click.option("--part", type=PARTS, help="Of a multimodal config; of the tiny one default: text.")
@click.option("--force", is_flag=True, help="Replace an earlier output, if nothing else lies in it.")
@click.option("-o", "--output", type=FOLDER, required=True, help="The folder to make.")
@talkative
def command(
    arch: str | None,
    config: Path | None,
    dtype: str,
    seed: int,
    hollow: bool,
    part: str | None,
    force: bool,
    output: Path,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write a checkpoint of seeded random weights, in the published layout, to try an export with."""
    from llmexport.export import archs, random_checkpoint

    console = Console(quiet, as_json)
    data = None if config is None else _read(config)
    if data is None and arch is None:
        raise ExportError("say what to write: --arch NAME, --config FILE, or both")
    named = archs.load(arch or "") if data is None else archs.choose(arch, data)
    random_checkpoint.write(named, output, config=data, dtype=dtype, seed=seed, hollow=hollow, part=part, force=force)
    held = sum(p.stat().st_size for p in output.iterdir())
    console.say(f"{named.name}: {size(held)} of {'hollow' if hollow else 'random'} {dtype} weights in {output}")
    console.result({"arch": named.name, "folder": str(output), "bytes": held})


def _read(path: Path) -> dict[str, object]:
    try:
        data = json.loads(read_regular(path))
    except OSError as error:
        raise ExportError(f"cannot read the config {path}: {error.strerror}: give a config.json") from error
    except (ValueError, RecursionError) as error:
        raise ExportError(f"cannot read the config {path}: {error}") from error
    if not isinstance(data, dict):
        raise ExportError(f"{path} holds no JSON object: is it a config.json?")
    return data
