"""llmexport engine"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from llmexport.export.cli.console import Console, size, talkative
from llmexport.export.cli.source import FOLDER, verifying
from llmexport.export.engine import BACKENDS, build, parse_profile
from llmexport.plugins import library

F = TypeVar("F", bound=Callable[..., Any])


def options(command: F) -> F:
    """The options that say how an engine is built."""
    for option in (
        click.option(
            "--plugins/--no-plugins",
            default=True,
            show_default=True,
            help="Our CUDA kernels, if `llmexport plugins build` has made them; else the function bodies of our ops.",
        ),
        click.option(
            "--profile",
            help="Sizes as min:opt:max, as in batch=1:1:4,sequence=1:64:512,past=0:512:2048 (the default).",
        ),
        click.option("--backend", type=click.Choice(list(BACKENDS)), default="tensorrt-rtx", show_default=True),
    ):
        command = option(command)
    return command


@click.command("engine")
@click.argument("folder", type=FOLDER)
@options
@click.option("--timeout", type=click.FloatRange(min=1), help="Seconds until the builder is given up.")
@verifying
@talkative
def command(
    folder: Path,
    backend: str,
    profile: str | None,
    plugins: bool,
    timeout: float | None,
    verify: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Build a TensorRT engine of an export: model.plan and engine.json, in FOLDER."""
    console = Console(quiet, as_json)
    record = build(
        folder,
        backend=backend,
        profile=parse_profile(profile) if profile else None,
        plugins=library.find() if plugins else None,
        timeout=timeout,
        verify=verify,
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
        ("weights read", record["checked"]),
        ("built in", f"{record['seconds']:.1f} s"),
    ]
