"""The folder that keeps traces and built libraries between runs: nobody but its user can write to it.

Its files become models and run as code, so it is held to the rules that ssh has for keys.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shlex
import stat
from pathlib import Path

from llmexport.plugins.errors import CacheError

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
PRIVATE = 0o700
# Names of our own files in it: traces, half-written ones, libraries and links.
OURS = re.compile(r"plugins|links|\.?[a-z_]+-[0-9a-f]{32}(-[0-9a-f]+)?")
CHOOSE = "set LLMEXPORT_CACHE to a folder of your own"


def cache_folder() -> Path:
    """$LLMEXPORT_CACHE, else `llmexport` in the user's cache folder: an absolute path, which is not checked.

    Raises CacheError if there is no home to put it in.
    """
    if chosen := os.environ.get("LLMEXPORT_CACHE"):
        return Path(os.path.abspath(chosen))
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not home.is_absolute():  # the standard says to ignore it then
        try:
            home = Path.home() / ".cache"
        except RuntimeError as error:
            raise CacheError(f"there is no home for a cache ({error}): {CHOOSE}") from error
        if not home.is_absolute():
            raise CacheError(f"there is no home for a cache (HOME is {os.environ.get('HOME')!r}): {CHOOSE}")
    return home / "llmexport"


def trusted_folder(*inside: str, make: bool = True) -> Path:
    """The cache folder, or the folder `inside` it, to which only this user can have written.

    make: whether missing folders are made. A cache folder of this user's that is open to others is closed, if nobody
    else can have put anything there. Raises CacheError on any other folder that is open, and on one that is missing or
    cannot be made.
    """
    folder = cache_folder()
    try:
        _check_above(folder)
        if make:
            _make(folder)
        _check_above(folder)
        _check_folder(folder)
        for part in inside:
            folder = folder / part
            if make:
                _make(folder)
            _check_inside(folder)
    except OSError as error:
        # error.filename is a number if the call was given an open file.
        where = folder if error.filename is None or isinstance(error.filename, int) else error.filename
        raise CacheError(f"cache folder {folder} cannot be used ({where}: {error.strerror}): {CHOOSE}") from error
    return folder


def owner(uid: int) -> str:
    """The name of a user, or the number if there is no name."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def _make(folder: Path) -> None:
    """Makes the folder and the missing ones above it, for this user alone."""
    if not folder.is_dir():
        if not folder.parent.is_dir():
            _make(folder.parent)
        # Another process may just have made it; if something else is in the way, the checks name it.
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, PRIVATE)


def _check_above(folder: Path) -> None:
    """Raises CacheError if another user can rename the folder, or can redirect a link on the way to it."""
    for place in (folder, *folder.parents):
        if not os.path.lexists(place):
            continue
        info = os.lstat(place)
        if stat.S_ISLNK(info.st_mode) and info.st_uid not in (0, os.geteuid()):
            whose = f"{place} is a link of {owner(info.st_uid)}'s"
            raise CacheError(f"cache folder {folder} is not used: {whose}: {CHOOSE}")
    for place in {*folder.parents, *Path(os.path.realpath(folder)).parents}:
        if not os.path.exists(place):
            continue
        info = os.stat(place)
        if info.st_uid not in (0, os.geteuid()):
            whose = f"{place} above it belongs to {owner(info.st_uid)}"
            raise CacheError(f"cache folder {folder} is not used: {whose}: {CHOOSE}")
        mode = info.st_mode
        if mode & OTHERS_WRITE and not mode & stat.S_ISVTX:
            cure = f"chmod go-w {shlex.quote(str(place))} (or +t, if all share it), or {CHOOSE}"
            raise CacheError(f"cache folder {folder} is not used: others can write to {place} above it: {cure}")


def _check_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        info = os.fstat(descriptor)
        _check_owner(folder, info)
        if not info.st_mode & 0o077:
            return
        held = os.listdir(descriptor)
        readable = not info.st_mode & OTHERS_WRITE and all(OURS.fullmatch(name) for name in held)
        if readable or not held:
            os.fchmod(descriptor, PRIVATE)
            # Others could write to an empty folder until now.
            if readable or all(_is_ours(name, descriptor) for name in os.listdir(descriptor)):
                return
    finally:
        os.close(descriptor)
    what = "can be written by others" if info.st_mode & OTHERS_WRITE else "is open to others and holds other things"
    # A folder that users share, as /tmp, must stay open.
    shared = info.st_mode & stat.S_ISVTX
    cure = CHOOSE if shared else f"chmod 700 {shlex.quote(str(folder))}, or {CHOOSE}"
    raise CacheError(f"cache folder {folder} {what}, and is not used: {cure}")


def _is_ours(name: str, folder: int) -> bool:
    return os.stat(name, dir_fd=folder, follow_symlinks=False).st_uid == os.geteuid()


def _check_inside(folder: Path) -> None:
    info = os.lstat(folder)
    if not stat.S_ISDIR(info.st_mode):
        raise CacheError(f"{folder} is no folder of this cache: remove it")
    _check_owner(folder, info)
    if info.st_mode & OTHERS_WRITE:
        raise CacheError(f"{folder} in the cache can be written by others, and is not used: remove it")


def _check_owner(folder: Path, info: os.stat_result) -> None:
    if info.st_uid != os.geteuid():
        whose = f"belongs to {owner(info.st_uid)}, not to {owner(os.geteuid())}"
        raise CacheError(f"cache folder {folder} {whose}, and is not used: {CHOOSE}")
