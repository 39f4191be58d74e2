"""llmexport plugins"""

from __future__ import annotations

from pathlib import Path

import click

from llmexport.export.cli.console import Console, size, talkative
from llmexport.export.cli.folder import FOLDER
from llmexport.plugins import emulated, library
from llmexport.plugins.declared import declared


@click.group("plugins")
def command() -> None:
    """The CUDA kernels of our ops, as one library of TensorRT plugins."""


@command.command("build")
@click.option("--archs", default=",".join(library.ARCHS), show_default=True, help="SM versions; the last also as PTX.")
@click.option("--build-dir", type=FOLDER, help="Where to compile; default: a folder in the cache, where engine looks.")
@click.option("--emulated", "on_cpu", is_flag=True, help="For this CPU, by g++ and the emulator: what validate runs.")
@click.option("--jobs", type=click.IntRange(1), help="Compilers at a time; default: one a core.")
@talkative
def build(archs: str, build_dir: Path | None, on_cpu: bool, jobs: int | None, quiet: bool, as_json: bool) -> None:
    """Compile the library with CMake, and nvcc or g++; no TensorRT is needed."""
    console = Console(quiet, as_json)
    if on_cpu and (build_dir or archs != ",".join(library.ARCHS)):
        raise click.UsageError("--emulated takes neither --archs nor --build-dir: leave them out")
    console.progress("compile", 0, 1)
    path = emulated.build(jobs) if on_cpu else library.build(archs.split(","), build_dir, jobs)
    console.progress("compile", 1, 1)
    ops = sorted(library.served(path) & {op.name for op in declared()})
    console.say(f"{path}: {size(path.stat().st_size)}, serves {', '.join(ops)}")
    console.result({"library": str(path), "bytes": path.stat().st_size, "ops": ops})
