"""The file of the plugin library: placed whole, with a record of its digest beside it, and checked before it is loaded.

The loader maps a library whose end is missing, and dies of SIGBUS when it touches that part.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shlex
import shutil
import struct
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any, BinaryIO

from llmexport.plugins.cache_folder import OTHERS_WRITE, owner
from llmexport.plugins.errors import PluginError
from llmexport.plugins.regular import open_regular, read_regular, sha256

MOST_RECORD = 100_000  # bytes
BUILD = "build it: llmexport plugins build"
# ELF of 64 bits, little end first, as on every machine with a GPU.
MAGIC = b"\x7fELF\x02\x01"
HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
SEGMENT = struct.Struct("<IIQQQQQQ")
SECTION = struct.Struct("<IIQQQQIIQQ")
SHARED_OBJECT, NO_BITS = 3, 8


def identity(info: os.stat_result) -> tuple[int, ...]:
    """Numbers that tell a file from any other, and from itself before a change."""
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns


def record_path(library: Path) -> Path:
    return library.with_name(f"{library.name}.json")


def writers(path: Path) -> set[int]:
    """Who may have written the library at `path`. Who installed this file may have installed one beside it."""
    beside = path.parent == Path(__file__).parent
    return {0, os.geteuid(), *([os.stat(__file__).st_uid] if beside else [])}


def check(path: Path, users: Set[int]) -> tuple[int, ...]:
    """The identity of the library at `path`, after a check that it is whole and that only `users` can have written it.

    Raises PluginError if it may not be loaded.
    """
    try:
        link = os.lstat(path)
        with open_regular(path) as file:
            info = os.fstat(file.fileno())
            for uid in (link.st_uid, info.st_uid):
                if uid not in users:
                    whose = f"belongs to {owner(uid)}, neither to root nor to you ({owner(os.geteuid())})"
                    raise PluginError(f"{path} {whose}, and is not loaded: {BUILD}")
            if info.st_mode & OTHERS_WRITE:
                cure = f"if you trust it: chmod go-w {shlex.quote(str(path))}"
                raise PluginError(f"{path} can be written by others, and is not loaded: {cure}")
            recorded = _recorded(path)
            if recorded is None:
                _check_whole(path, file, info.st_size)
            elif sha256(file) != recorded:
                raise PluginError(f"{path} is not the file that was built, it is cut or changed: {BUILD}")
            return identity(info)
    except OSError as error:
        raise PluginError(f"{path} is no plugin library: {error.strerror}. B{BUILD[1:]}") from error


def place(made: Path, path: Path, about: dict[str, Any]) -> None:
    """Puts a copy of the library at `made` at `path`, and the record of its digest beside it. Raises OSError."""
    digest = _digest_at(made)
    if not _is_placed(path, digest):
        # In this order no library ever lies beside another's record.
        record_path(path).unlink(missing_ok=True)
        _appear(path, 0o755, lambda beside: shutil.copyfile(made, beside))
        text = json.dumps({**about, "sha256": digest}, indent=1)
        _appear(record_path(path), 0o644, lambda beside: beside.write_text(text))
    # library.find() takes the newest: the last library that was asked for.
    os.utime(path)


def drop_unless_placed(made: Path, path: Path) -> None:
    """Removes the library that a broken build may have left at `made`, so that it is linked anew. Raises OSError."""
    if made.exists() and _digest_at(made) != _recorded(path):
        made.unlink()


def _is_placed(path: Path, digest: str) -> bool:
    """Whether the library at `path` has this digest and may be loaded."""
    try:
        check(path, {0, os.geteuid()})
    except PluginError:
        return False
    return _recorded(path) == digest


def _appear(path: Path, mode: int, write: Callable[[Path], object]) -> None:
    """Makes a file that is whole from the moment it is at `path`, and has `mode`."""
    beside = path.with_name(f".{path.name}")
    try:
        write(beside)
        os.chmod(beside, mode)
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _recorded(library: Path) -> str | None:
    """The digest in the record beside the library; None without a record, "" if it has no digest. Raises OSError."""
    try:
        said = json.loads(read_regular(record_path(library), MOST_RECORD))["sha256"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return str(said)


def _digest_at(path: Path) -> str:
    """The digest of the file at `path`; "" if there is none."""
    try:
        with open_regular(path) as file:
            return sha256(file)
    except FileNotFoundError:
        return ""


def _check_whole(path: Path, file: BinaryIO, size: int) -> None:
    """All that the ELF headers describe must lie in the file."""
    header = file.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise PluginError(f"{path} is no plugin library: it is no ELF file of 64 bits. B{BUILD[1:]}")
    _, kind, _, _, _, segments_at, sections_at, _, _, *sizes = HEADER.unpack(header)
    segment_size, segments, section_size, sections, _ = sizes
    known = segment_size in (0, SEGMENT.size) and section_size in (0, SECTION.size)
    if kind != SHARED_OBJECT or not known:
        raise PluginError(f"{path} is no plugin library: its ELF header is not that of a shared object. B{BUILD[1:]}")
    ends = [segments_at + segments * segment_size, sections_at + sections * section_size]
    if max(ends) <= size:
        file.seek(segments_at)
        table = file.read(segments * segment_size)
        ends += [offset + stored for _, _, offset, _, _, stored, *_ in SEGMENT.iter_unpack(table)]
        file.seek(sections_at)
        table = file.read(sections * section_size)
        ends += [s[4] + s[5] for s in SECTION.iter_unpack(table) if s[1] != NO_BITS]
    if max(ends) > size:
        raise PluginError(f"{path} is truncated, it has {size} of {max(ends)} bytes: {BUILD}")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lets in one build at a time. Raises PluginError if another is in the folder, or the folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise PluginError(f"another build is under way in {folder}: wait for it") from error
            except OSError as error:
                # Some network file systems have no locks.
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
            yield
    except OSError as error:
        cure = "make room, or name another --build-dir"
        raise PluginError(f"cannot build in {folder} ({error.filename or ''}: {error.strerror}): {cure}") from error
