"""A file that is read: what tells it from another, and from itself at another time, and what it says if it cannot."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llmexport.export.errors import ExportError


@dataclass(frozen=True, slots=True)
class Stamp:
    device: int
    inode: int
    nbytes: int
    mtime_ns: int


def stamp(file: int | Path) -> Stamp:
    """The stamp of an open file or of what lies at a path."""
    info = os.stat(file)
    return Stamp(info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns)


def check_stamp(file: int | Path, seen: Stamp, path: Path) -> None:
    """Raise ExportError if the file, open or at its path, is not what it was when it was `seen`."""
    if stamp(file) != seen:
        raise ExportError(f"{path} changed while it was used: run this again when nothing writes to it any more")


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn what the user can mend, while `path` is read, into an ExportError."""
    try:
        yield
    except OSError as error:
        what = f"cannot read {error.filename or path}: {error.strerror}"
        raise ExportError(f"{what}: check that it is there and that you may read it") from error
