"""llmexport engine"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from llmexport.export.cli.console import Console, size, talkative
from llmexport.export.cli.source import FOLDER


@click.command("engine")
@click.argument("folder", type=FOLDER)
@click.option("--backend", type=click.Choice(["tensorrt-rtx", "tensorrt"]), default="tensorrt-rtx", show_default=True)
@click.option(
    "--profile",
    help="Sizes as min:opt:max, as in batch=1:1:4,sequence=1:64:512,past=0:512:2048 (the default).",
)
@click.option(
    "--plugins/--no-plugins",
    default=True,
    show_default=True,
    help="Our CUDA kernels for our ops, if `llmexport plugins build` has made them; else their function bodies.",
)
@click.option("--timeout", type=click.FloatRange(min=1), help="Seconds until the builder is given up.")
@talkative
def command(
    folder: Path, backend: str, profile: str | None, plugins: bool, timeout: float | None, quiet: bool, as_json: bool
) -> None:
    """Build a TensorRT engine of an export: model.plan and engine.json, in FOLDER."""
    from llmexport.export import engine
    from llmexport.plugins import library

    console = Console(quiet, as_json)
    sizes = engine.parse_profile(profile) if profile else None
    record = engine.build(
        folder,
        backend=backend,
        profile=sizes,
        plugins=library.find() if plugins else None,
        timeout=timeout,
        progress=console.progress,
    )
    console.table(f"engine in {folder}", (), summary(record))
    console.result(record)


def summary(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of what was built."""
    profile = ", ".join(f"{n} {low} to {high}" for n, (low, _, high) in record["profile"].items())
    plugins = ", ".join(f"{n} {op}" for p in record["plugins"] for op, n in p["ops"].items())
    return [
        ("engine", f"{record['backend']} {record['version']}, {size(record['plan']['bytes'])}"),
        ("takes", profile),
        ("plugin layers", plugins or "none: our ops are built from their bodies, see `llmexport plugins build`"),
        ("runs on", record["target"]),
        ("built in", f"{record['seconds']:.1f} s"),
    ]
