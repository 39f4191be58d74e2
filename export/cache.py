"""Traced graphs on disk, so that a block known from before costs no trace and no import of torch."""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmexport.export import shipped
from llmexport.export.values import visible
from llmexport.plugins.cache_folder import OTHERS_WRITE, trusted_folder
from llmexport.plugins.errors import CacheError
from llmexport.plugins.regular import open_regular

# What the entries depend on: these libraries, and our own source that traces, stitches and fuses.
LIBRARIES = ("torch", "onnx", "onnxscript", "onnx-ir", "onnx-graphsurgeon")
LARGEST = 1 << 30  # bytes of an entry; traces have no weights, the largest known are a thousandth of it
ROOT = Path(__file__).parent.parent
SOURCES = (
    "graphs/*.py",
    "plugins/*.py",
    "plugins/*/*.py",
    "export/blocks/*.py",
    "export/graph_file.py",
    "export/spec/*.py",
    "export/shortcuts.py",
    "export/trace.py",
    "export/tidy.py",
)


def cached(kind: str, key: Any, make: Callable[[], bytes]) -> bytes:
    """The bytes that `make` gives for this key (JSON data), from disk if they were made before, or came with the wheel.

    Entries live in $LLMEXPORT_CACHE, else in the user's cache folder. One that does not carry the digest of its key
    and data, or that another can have written, is made anew; a folder that cannot be used costs only time.
    """
    text = json.dumps([kind, key, versions(), source_digest()], sort_keys=True)
    key_digest = hashlib.sha256(text.encode())
    try:
        path = trusted_folder() / f"{kind}-{key_digest.hexdigest()[:32]}"
    except CacheError as error:
        _note(f"traces are not kept: {error}")
        return _made(kind, key, make)
    stored = _read(path)
    digest, data = stored[:32], stored[32:]
    if data and _digest(key_digest.digest(), data) == digest:
        return data
    data = _made(kind, key, make)
    _store(path, _digest(key_digest.digest(), data) + data)
    return data


def _made(kind: str, key: Any, make: Callable[[], bytes]) -> bytes:
    brought = shipped.find(kind, key, source_digest())
    if brought is not None:
        return brought
    with unswept():
        return make()


@contextlib.contextmanager
def unswept() -> Iterator[None]:
    """No search for unreachable cycles meanwhile: a fifth of the time of a first trace, as imports leave few behind.

    The next search looks at all that was made meanwhile, so that an export is within one of these as a whole.
    """
    swept = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if swept:
            gc.enable()


def _digest(key: bytes, data: bytes) -> bytes:
    """The digest of both, so that an entry under the name of another key is none."""
    return hashlib.sha256(key + data).digest()


def _read(path: Path) -> bytes:
    """The entry at `path`; nothing if there is none, or one that another user has made or can change."""
    try:
        with open_regular(path, follow=False) as file:
            info = os.fstat(file.fileno())
            ours = info.st_uid == os.geteuid() and not info.st_mode & OTHERS_WRITE
            return file.read() if ours and info.st_size <= LARGEST else b""
    except OSError:
        return b""


@functools.cache
def versions() -> dict[str, str]:
    """The versions of what traces: libraries and our own."""
    return {n: importlib.metadata.version(n) for n in (*LIBRARIES, "llmexport")}


@functools.cache
def source_digest() -> str:
    """The digest of our own source that traces, stitches and fuses."""
    digest = hashlib.sha256()
    for path in sorted(p for pattern in SOURCES for p in ROOT.glob(pattern)):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _store(path: Path, data: bytes) -> None:
    beside = path.with_name(f".{path.name}-{os.urandom(4).hex()}")
    try:
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(data)
        os.replace(beside, path)
    except OSError as error:
        _note(f"traces are not kept: cannot write to {path.parent}: {error.strerror}")
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


@functools.cache
def _note(text: str) -> None:
    """Said once; on stderr, unless whoever uses this library has other plans for its log."""
    import logging

    logging.getLogger("llmexport").warning("note: %s", visible(text))
