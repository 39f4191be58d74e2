"""Outputs appear whole or not at all: write beside, fsync, rename."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmexport.export.errors import ExportError

_ADVICE = {
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
        if error.errno not in _ADVICE:
            raise
        at = f" at {error.filename}" if error.filename else ""
        raise ExportError(f"cannot write {path}: {error.strerror}{at}: {_ADVICE[error.errno]}") from error


@contextmanager
def new_folder(target: Path, *, force: bool, marker: str = "manifest.json") -> Iterator[Path]:
    """Yield an empty folder that becomes `target` if the block ends well and is removed if it does not.

    With `force` it takes the place of an empty folder or of an earlier output, known by its file `marker`.
    Until it stands there, any failure, Ctrl-C included, leaves `target` as it was.
    """
    target = Path(os.path.realpath(target))
    with write_errors(target):
        _check_target(target, force, marker)
        with _workspace(target.parent, target) as work:
            new = work / "new"
            os.mkdir(new)
            yield new
            for path in [*new.rglob("*"), new]:
                _sync(path)
            try:
                if force and os.path.lexists(target):
                    os.rename(target, work / "old")
                os.rename(new, target)
                _sync(target.parent)
            except BaseException:
                if not os.path.lexists(new):
                    os.rename(target, new)
                raise


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write or replace files of an existing output: all of them beside it, then rename in the given order."""
    with write_errors(folder / next(iter(files))), _workspace(folder, folder) as work:
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
    names = os.listdir(target)
    if names and marker not in names:
        raise ExportError(
            f"{target} has no {marker}, so it is no earlier output, and --force does not replace it: "
            "choose another folder, or remove it yourself"
        )


@contextmanager
def _workspace(folder: Path, target: Path) -> Iterator[Path]:
    """Yield a new hidden folder in `folder`, and remove it. A `target` moved to "old" in it is put back."""
    work = folder / f".llmexport-{os.urandom(8).hex()}"
    try:
        os.mkdir(work)
        yield work
    finally:
        try:
            _settle(work, target)
        except BaseException:
            # Ctrl-C just here: finish, then stop.
            _settle(work, target)
            raise


def _settle(work: Path, target: Path) -> None:
    # Asks the disk, as an interrupt can come between a rename and a variable that remembers it.
    old = work / "old"
    if os.path.lexists(old) and not os.path.lexists(target):
        os.rename(old, target)
    shutil.rmtree(work, ignore_errors=True)


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
