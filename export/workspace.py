"""Hidden folders in which outputs are made, beside the place they are for.

A process that is killed leaves its own. Whoever makes the next one there removes it: a lock on a file in it, which
ends with its owner, says whether the owner lives, in whatever container.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

PREFIX = ".llmexport-"
OWNER = ".owner"
OLD = "old"  # an output that stands aside, where it cannot change places in one step
BOOT = Path("/proc/sys/kernel/random/boot_id")
# On a file system shared by machines a lock may be known to one of them alone.
FOREIGN = 7 * 86400
AT_FDCWD, RENAME_EXCHANGE = -100, 2


@contextmanager
def workspace(folder: Path, target: Path | None = None) -> Iterator[Path]:
    """Yield a new hidden folder in `folder`, and remove it. A `target` moved to OLD in it is put back."""
    sweep(folder)
    work = folder / f"{PREFIX}{os.urandom(8).hex()}"
    owner: list[IO[bytes]] = []
    try:
        os.mkdir(work)
        _own(work, target, owner)
        yield work
    finally:
        try:
            _settle(work, target, owner)
        except BaseException:
            # Ctrl-C just here: finish, then stop.
            _settle(work, target, owner)
            raise


def sweep(folder: Path) -> None:
    """Remove what dead processes of this user left in `folder`, and put back the outputs that they had moved away."""
    for work in folder.glob(f"{PREFIX}*"):
        # Another may do the same now, and what cannot be removed harms nobody.
        with suppress(OSError, ValueError, KeyError):
            _sweep(work)


def exchange(new: Path, target: Path) -> bool:
    """Let two files or folders change places in one step; False where the system or the file system cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return call is not None and not call(
        AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(target), ctypes.c_uint(RENAME_EXCHANGE)
    )


def _own(work: Path, target: Path | None, owner: list[IO[bytes]]) -> None:
    owner.append(open(work / OWNER, "xb", buffering=0))  # noqa: SIM115  _settle closes it
    try:
        fcntl.flock(owner[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        # Without a lock nothing may be written here, as that says that the lock tells.
        return
    owner[0].write(json.dumps({"boot": _boot(), "target": target.name if target else ""}).encode())


def _settle(work: Path, target: Path | None, owner: list[IO[bytes]]) -> None:
    # Asks the disk, as an interrupt can come between a rename and a variable that remembers it.
    old = work / OLD
    if target and os.path.lexists(old) and not os.path.lexists(target):
        os.rename(old, target)
    # Before it is removed: NFS keeps a file that is open.
    for file in owner:
        file.close()
    shutil.rmtree(work, ignore_errors=True)


def _sweep(work: Path) -> None:
    info = os.lstat(work)
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid():
        return
    with open(work / OWNER, "rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        text = file.read()
        # One without a word could not be locked, or is about to be.
        said = json.loads(text) if text.endswith(b"}") else {}
    old, name = work / OLD, said.get("target")
    if name and Path(name).name == name and os.path.lexists(old) and not os.path.lexists(work.parent / name):
        os.rename(old, work.parent / name)
    if said and (said["boot"] == _boot() or info.st_mtime < time.time() - FOREIGN):
        shutil.rmtree(work, ignore_errors=True)


def _boot() -> str:
    """What tells this machine since its start from others; nothing where that is not known."""
    try:
        return BOOT.read_text().strip()
    except OSError:
        return ""
