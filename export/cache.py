"""Traced graphs on disk, so that a block known from before costs no trace and no import of torch."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmexport.plugins.cache_folder import cache_folder

# What the entries depend on: these libraries, and our own source that traces, stitches and fuses.
LIBRARIES = ("torch", "onnx", "onnxscript", "onnx-ir", "onnx-graphsurgeon")
ROOT = Path(__file__).parent.parent
SOURCES = (
    "graphs/*.py",
    "plugins/*.py",
    "plugins/*/*.py",
    "export/blocks/*.py",
    "export/onnx_file.py",
    "export/spec/*.py",
    "export/trace.py",
    "export/tidy.py",
)


def cached(kind: str, key: Any, make: Callable[[], bytes]) -> bytes:
    """The bytes that `make` gives for this key (JSON data), from disk if they were made before.

    Entries live in $LLMEXPORT_CACHE, else in the user's cache folder. One that does not carry its own digest is
    made anew; a folder that cannot be written costs only time.
    """
    text = json.dumps([kind, key, versions(), _source_digest()], sort_keys=True)
    path = cache_folder() / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"
    try:
        stored = path.read_bytes()
    except OSError:
        stored = b""
    digest, data = stored[:32], stored[32:]
    if data and hashlib.sha256(data).digest() == digest:
        return data
    data = make()
    _store(path, hashlib.sha256(data).digest() + data)
    return data


@functools.cache
def versions() -> dict[str, str]:
    """The versions of what traces: libraries and our own."""
    return {n: importlib.metadata.version(n) for n in (*LIBRARIES, "llmexport")}


@functools.cache
def _source_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(p for pattern in SOURCES for p in ROOT.glob(pattern)):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _store(path: Path, data: bytes) -> None:
    beside = path.with_name(f".{path.name}-{os.urandom(4).hex()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(data)
        os.replace(beside, path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
