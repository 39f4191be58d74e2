"""Outputs appear whole or not at all: write beside, fsync, rename."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from llmexport.export import earlier, interrupt
from llmexport.export.errors import ExportError
from llmexport.export.workspace import OLD, exchange, sweep, workspace

ADVICE = {
    errno.ENOSPC: "free space or choose another disk",
    errno.EDQUOT: "free some of your quota or choose another disk",
    errno.EFBIG: "choose a file system that takes files of this size, and see `ulimit -f`",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "choose a folder on a file system that is not read-only",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EXDEV: "it cannot be moved (a layer of a container image?), choose another folder",
    errno.ENOTEMPTY: "another run made it meanwhile, choose another folder",
}


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn what the user can mend, while `path` is written, into an ExportError; other errors are bugs."""
    try:
        yield
    except OSError as error:
        if not os.path.isdir(path.parent):
            raise ExportError(f"cannot write {path}: {path.parent} is not a folder: make it first") from error
        if error.errno not in ADVICE:
            raise
        at = f" at {error.filename}" if error.filename else ""
        raise ExportError(f"cannot write {path}: {error.strerror}{at}: {ADVICE[error.errno]}") from error


@contextmanager
def new_folder(target: Path, *, force: bool, marker: str = earlier.EXPORT) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` if the block ends well and is removed if it does not.

    With `force` it takes the place of an empty folder or of an earlier output, known by its file `marker` and
    holding only what that records. At any moment one of the two stands there, whole; any failure, Ctrl-C included,
    leaves `target` as it was.
    """
    _check_parent(target)
    target = Path(os.path.realpath(target))
    with write_errors(target):
        sweep(target.parent)
        _check_target(target, force, marker)
        with workspace(target.parent, target) as work:
            new = work / "new"
            os.mkdir(new)
            yield new
            for path in [*new.rglob("*"), new]:
                _sync(path)
            if force:
                # What was put there meanwhile is not deleted either.
                _check_target(target, force, marker)
            interrupt.check()
            _place(new, target, work / OLD if force else None)


def _place(new: Path, target: Path, old: Path | None) -> None:
    """Put `new` where `target` will be, or is, if there is a place for it, `old`, which its owner puts back."""
    own = os.stat(new).st_ino
    try:
        if old is None or not os.path.lexists(target):
            os.rename(new, target)
        elif not exchange(new, target):
            os.rename(target, old)
            os.rename(new, target)
        _sync(target.parent)
    except BaseException:
        # The disk is asked what was done.
        if os.path.lexists(target) and os.lstat(target).st_ino == own:
            if os.path.lexists(new):
                exchange(new, target)
            else:
                os.rename(target, new)
        raise


@contextmanager
def new_file(target: Path, *, force: bool, ours: Callable[[Path], bool]) -> Iterator[BinaryIO]:
    """Yield an open file that becomes `target` if the block ends well; whatever fails, `target` is as it was.

    With `force` it takes the place of an earlier one, which `ours` knows.
    """
    target = check_new_file(target, force, ours)
    with write_errors(target), workspace(target.parent) as work:
        with open(work / "new", "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        interrupt.check()
        check_new_file(target, force, ours)
        os.replace(work / "new", target)
        _sync(target.parent)


def check_new_file(target: Path, force: bool, ours: Callable[[Path], bool]) -> Path:
    """The resolved path of a file that may be written; for a check before the work, too. Raises ExportError."""
    _check_parent(target)
    target = Path(os.path.realpath(target))
    if not os.access(target.parent, os.W_OK):
        raise ExportError(f"cannot write {target}: {target.parent} cannot be written to: choose another folder")
    with write_errors(target):
        if not os.path.lexists(target):
            return target
        if not os.path.isfile(target):
            raise ExportError(f"{target} is not a regular file: choose another name for the output")
        if not force:
            raise ExportError(f"{target} exists: choose another name, or pass --force to replace it")
        if not ours(target):
            raise ExportError(f"{target} is no earlier output, and --force does not replace it: choose another name")
    return target


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write or replace files of an existing output: all of them beside it, then rename in the given order."""
    with write_errors(folder / next(iter(files))), workspace(folder) as work:
        for name, data in files.items():
            with open(work / name, "xb") as file:
                file.write(data)
            _sync(work / name)
        for name in files:
            os.replace(work / name, folder / name)
        _sync(folder)


def _check_target(target: Path, force: bool, marker: str) -> None:
    try:
        mode = os.lstat(target).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(mode):
        raise ExportError(f"{target} is not a folder: choose another name for the output")
    if os.path.ismount(target):
        raise ExportError(f"{target} is a mount point, which nothing can replace: choose a folder inside it")
    if not force:
        raise ExportError(f"{target} exists: choose another folder, or pass --force to replace it")
    if Path(os.path.realpath(os.getcwd())).is_relative_to(target):
        raise ExportError(f"{target} holds the folder that you are in, and --force would replace it: leave it first")
    earlier.check(target, marker)


def _check_parent(target: Path) -> None:
    # Before ".." is resolved: it has a meaning only where there is a folder.
    if not os.path.isdir(target.parent):
        raise ExportError(f"cannot write {target}: {target.parent} is not a folder: make it first")


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
