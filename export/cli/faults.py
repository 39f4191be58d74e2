"""Errors that no layer of ours named and that a user can mend all the same: one line each, said here alone."""

from __future__ import annotations

import errno
import re
import traceback
from collections.abc import Iterator

from llmexport.export.output import ADVICE

# Beyond what can go wrong where an output is written.
MORE_ADVICE = {
    errno.ENOENT: "check that it is there, and that nothing else moves or deletes it meanwhile",
    errno.ENOTDIR: "check the name, a part of it is a file",
    errno.EISDIR: "check the name, a folder is where a file belongs",
    errno.ELOOP: "mend the symbolic links, which lead in a circle",
    errno.EMFILE: "raise the limit of open files, see `ulimit -n`",
    errno.ENFILE: "the whole system has too many open files: end other programs",
    errno.ENOMEM: "free memory, or raise the limit, see `ulimit -v`",
    errno.EAGAIN: "raise the limit of processes, see `ulimit -u`",
    errno.EPIPE: "its reader has ended",
    errno.EIO: "the disk or the file system is at fault, see `dmesg`",
    errno.ESTALE: "the file server has lost it: mount it again",
}
# What libraries say, in errors of whatever type, when the system gives them no more.
MEMORY = re.compile(r"bad_?alloc|allocate memory|[Ff]ailed to allocate|failed to map segment|Unable to allocate")
HANDLES = re.compile(r"Too many open files")
THREADS = re.compile(r"can't start new thread|Resource temporarily unavailable")


def in_one_line(error: Exception) -> str:
    """What was found and what to do; nothing if the error is a bug."""
    for found in _causes(error):
        if isinstance(found, OSError) and found.errno is not None:
            return _of_system(found)
        said = str(found)
        if isinstance(found, MemoryError) or MEMORY.search(said):
            return f"out of memory ({_first(said) or 'of this process'}): {MORE_ADVICE[errno.ENOMEM]}"
        if HANDLES.search(said):
            return f"{_first(said)}: {MORE_ADVICE[errno.EMFILE]}"
        if THREADS.search(said):
            return f"{_first(said)}: {MORE_ADVICE[errno.EAGAIN]}"
        if isinstance(found, OSError):
            return _first(said) or type(found).__name__
        if isinstance(found, RecursionError) and _in_json(found):
            return "JSON is nested too deeply: is it the file that was meant?"
    return ""


def _of_system(error: OSError) -> str:
    names = " and ".join(str(n) for n in (error.filename, error.filename2) if n is not None)
    advice = (MORE_ADVICE | ADVICE).get(error.errno or 0, "")
    return ": ".join(filter(None, (names, error.strerror or type(error).__name__, advice)))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def _in_json(error: BaseException) -> bool:
    """Whether it came up where JSON is read, written or copied."""
    modules = {str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)}
    return any(m == "copy" or m.startswith("json.") for m in modules)


def _first(text: str) -> str:
    return text.strip().partition("\n")[0]
