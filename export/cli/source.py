"""Where a command's checkpoint comes from: a folder of the user's, or the built-in tiny one."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from llmexport.export import archs
from llmexport.export.checkpoint import Checkpoint, open_checkpoint
from llmexport.export.errors import ExportError
from llmexport.export.output import write_errors
from llmexport.export.spec import DTYPES

F = TypeVar("F", bound=Callable[..., Any])
FOLDER = click.Path(path_type=Path)


def options(command: F) -> F:
    """The options that say what to export, and into what."""
    for option in (
        click.option("--force", is_flag=True, help="Replace an earlier output."),
        click.option(
            "--weights",
            type=click.Choice(["auto", "link", "copy"]),
            default="auto",
            help="Hard links to the shards (no new bytes) or copies; auto takes the first of reflinks (no new bytes "
            "either, and files that every tool opens), links and copies that the file system has.",
        ),
        click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True),
        click.option(
            "--checkpoint", type=FOLDER, help="Folder with config.json and safetensors; default: tiny, random."
        ),
        click.option("--arch", help="Architecture, see `llmexport archs`; default: what config.json says."),
    ):
        command = option(command)
    return command


def verifying(command: F) -> F:
    """The option of commands that start from an export."""
    return click.option(
        "--verify",
        is_flag=True,
        help="Read every byte of the weights, against the digests of `onnx --digest` or of the first `validate`.",
    )(command)


@contextmanager
def open_source(arch: str | None, folder: Path | None, beside: Path) -> Iterator[tuple[archs.Named, Checkpoint]]:
    """The checkpoint in `folder`; without one, a tiny random one, for as long as the export takes."""
    if folder is not None:
        checkpoint = open_checkpoint(folder)
        yield archs.choose(arch, checkpoint.config), checkpoint
        return
    if arch is None:
        raise ExportError("say what to export: --checkpoint DIR, or --arch NAME for its built-in tiny config")
    named = archs.load(arch)
    from llmexport.export import random_checkpoint

    # Beside the output, so that the shards can be linked and outlive the folder.
    parent = beside.resolve().parent
    with contextlib.ExitStack() as stack:
        with write_errors(beside.resolve()):
            name = stack.enter_context(tempfile.TemporaryDirectory(prefix=".llmexport-", dir=parent))
        made = Path(name) / "checkpoint"
        random_checkpoint.write(named, made, shard_bytes=100_000)
        yield named, open_checkpoint(made)
