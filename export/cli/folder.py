"""Paths that commands take, and what those that start from an export share. It imports nothing of what they do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


class Folder(click.Path):
    """A path; an empty one, as of an unset variable, is not the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("the name is empty", param, ctx)
        return super().convert(value, param, ctx)


FOLDER = Folder(path_type=Path)


def verifying(command: F) -> F:
    """The option of commands that start from an export."""
    return click.option(
        "--verify",
        is_flag=True,
        help="Read every byte of the weights, against the digests of `onnx --digest` or of the first `validate`.",
    )(command)
