"""Where tensors lie in a new safetensors file, and the header that says so."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path

from llmexport.export.stored_tensor import StoredTensor
from llmexport.plugins.dtypes import BY_SAFETENSORS, Dtype

# Bytes of a line of a processor's cache. What is mapped from a file is read where it lies, and vectors that cross lines
# are read at a lower rate.
LINE = 64


def unplaced(name: str, dtype: Dtype, shape: tuple[int, ...]) -> StoredTensor:
    """A tensor that has no place yet."""
    return StoredTensor(name, dtype.safetensors, shape, "", 0, math.prod(shape) * dtype.bits // 8)


def laid_out(file: str, tensors: Iterable[StoredTensor]) -> tuple[bytes, dict[str, StoredTensor]]:
    """The header of a file of these tensors, its length included, and each with its place there, by name.

    Tensors of whole lines of a cache lie first, each from the start of one on, and the widest types of the others, so
    that every tensor is aligned.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    placed, end = [], 0
    for tensor in sorted(tensors, key=lambda t: (t.nbytes % LINE > 0, -BY_SAFETENSORS[t.dtype].bits)):
        placed.append(dataclasses.replace(tensor, file=file, offset=end))
        start, end = end, end + tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % LINE)
    header = len(text).to_bytes(8, "little") + text
    return header, {t.name: dataclasses.replace(t, offset=len(header) + t.offset) for t in placed}


def write_holes(path: Path, tensors: Iterable[StoredTensor]) -> None:
    """A file of these tensors whose data is one hole: it reads as zeros and takes no space."""
    header, placed = laid_out(path.name, tensors)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(t.nbytes for t in placed.values()))
