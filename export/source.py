"""Where a checkpoint comes from: a folder of the user's, or the built-in tiny one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmexport.export import archs
from llmexport.export.checkpoint import Checkpoint, open_checkpoint
from llmexport.export.errors import ExportError
from llmexport.export.examples import example
from llmexport.export.output import write_errors
from llmexport.export.spec import Arch
from llmexport.export.workspace import workspace


def chosen(part: str | None, folder: object) -> str:
    """The part that is exported where nobody says: all of a checkpoint, and the text model of the built-in tiny one."""
    return part or ("text" if folder is None else "all")


@contextmanager
def open_source(
    arch: str | None, folder: Path | None, beside: Path, part: str = "text", block: str | None = None
) -> Iterator[tuple[Arch, Checkpoint]]:
    """The checkpoint in `folder`; without one, a tiny random one of this part, for as long as the export takes, or one
    of a `block` that no architecture is named for."""
    if folder is not None:
        checkpoint = open_checkpoint(folder)
        yield archs.choose(arch, checkpoint.config), checkpoint
        return
    if arch is None and block is None:
        raise ExportError("say what to export: --checkpoint DIR, or --arch NAME for its built-in tiny config")
    named = archs.load(arch) if arch else example(str(block))
    from llmexport.export import random_checkpoint

    # Beside the output, so that the shards can be linked and outlive the folder.
    target = Path(os.path.realpath(beside))
    with contextlib.ExitStack() as stack:
        with write_errors(target):
            made = stack.enter_context(workspace(target.parent)) / "checkpoint"
        random_checkpoint.write(named, made, part=part, shard_bytes=100_000)
        found = open_checkpoint(made)
        yield archs.choose(arch, found.config) if arch else named, found
