"""Traces that a wheel brings along, so that the first export of a model as it is published needs none.

They are made for a release, by `tests/ship_traces.py`; a clone has none.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("traces.zip")
INDEX = "index.json"


def find(kind: str, key: Any, sources: str) -> bytes | None:
    """The trace of this kind and key, if the file has it and was made by our source of this digest."""
    made_by, places = _index(FILE)
    place = places.get(name_of(kind, key)) if made_by == sources else None
    if place is None:
        return None
    member, first, end = place
    held = _read(FILE, member)
    return held[first:end] if held else None


def write(path: Path, members: Mapping[str, Mapping[str, bytes]], sources: str) -> None:
    """Writes a file of these traces, by member and by what `name_of` calls each."""
    import zipfile

    places = {}
    with zipfile.ZipFile(path, "w") as file:
        for member, traces in members.items():
            end = 0
            for name, data in traces.items():
                places[name] = (member, end, end := end + len(data))
            # Without a time, so that the same traces are the same file.
            file.writestr(zipfile.ZipInfo(member), b"".join(traces.values()), zipfile.ZIP_LZMA)
        file.writestr(zipfile.ZipInfo(INDEX), json.dumps([sources, places]), zipfile.ZIP_LZMA)


def name_of(kind: str, key: Any) -> str:
    return hashlib.sha256(json.dumps([kind, key], sort_keys=True).encode()).hexdigest()[:32]


@functools.cache
def _index(path: Path) -> tuple[str, dict[str, tuple[str, int, int]]]:
    """The digest of the source that made the traces, and of each the member, its first byte there and the one behind
    its last."""
    sources, places = json.loads(_read(path, INDEX) or '["", {}]')
    return sources, places


def _read(path: Path, member: str) -> bytes:
    """A member of the file; nothing if there is no file, or one that is damaged, which the digests in it tell."""
    if not path.is_file():
        return b""
    import lzma
    import struct
    import zipfile

    damaged = (zipfile.BadZipFile, lzma.LZMAError, struct.error, OSError, EOFError, KeyError, ValueError, RuntimeError)
    try:
        with zipfile.ZipFile(path) as file:
            return file.read(member)
    except damaged:
        return b""
