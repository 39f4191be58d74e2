"""What no runtime reads as it is published, packed anew: one tensor at a time, in a file beside the weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from llmexport.export import interrupt
from llmexport.export.checkpoint import Checkpoint, StoredTensor, read_header
from llmexport.export.errors import ExportError
from llmexport.export.identity import Held, WeightFile, identify
from llmexport.export.output import write_errors
from llmexport.export.packed.matrix import Matrix, Read, pack, unpack
from llmexport.export.placing import check_space
from llmexport.export.values import show_name
from llmexport.plugins.dtypes import BY_NAME

FILE = "repacked.safetensors"
# What is made of a matrix NAME; the numbers are its transpose.
NUMBERS, ZEROS, PLACES, RANKS = "/numbers", "/zeros", "/places", "/ranks"


@dataclass(frozen=True)
class Piece:
    """A tensor to be written: its bytes are made when it is its turn."""

    name: str
    dtype: str  # of BY_NAME
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BY_NAME[self.dtype].bits // 8


def pieces(matrices: Iterable[Matrix], checkpoint: Checkpoint) -> Iterator[Piece]:
    """What has to be packed anew for a graph to read these. Raises ExportError on groups that are none."""
    for matrix in matrices:
        rows, columns = matrix.shape
        places, zeros = _places(matrix, checkpoint.read), _zeros(matrix, checkpoint.read)
        if (matrix.layout != "rows" or places is not None or zeros) and rows * matrix.bits % 8:
            raise ExportError(f"{matrix.name} has {rows} rows, which bytes of two numbers do not fill")
        if matrix.layout != "rows" or places is not None:
            numbers = partial(_numbers, matrix, places, bool(zeros), checkpoint.read)
            yield Piece(matrix.name + NUMBERS, "uint8", (columns, rows * matrix.bits // 8), numbers)
        if places is not None:
            yield Piece(matrix.name + PLACES, "int64", (columns,), partial(np.asarray, places))
            yield Piece(matrix.name + RANKS, "int64", (columns,), partial(np.argsort, places))
        if zeros:
            yield Piece(matrix.name + ZEROS, "uint8", (matrix.grid[1], rows * matrix.bits // 8), zeros)


def planned(found: Iterable[Piece], offset: int) -> list[StoredTensor]:
    """The same pieces as tensors of the file, whose data begins at `offset`."""
    tensors = []
    for piece in found:
        dtype = BY_NAME[piece.dtype].safetensors
        tensors.append(StoredTensor(piece.name, dtype, piece.shape, FILE, offset, piece.nbytes))
        offset += piece.nbytes
    return tensors


def header(found: list[Piece]) -> bytes:
    """The beginning of a safetensors file of these, its length included."""
    said = {
        t.name: {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [t.offset, t.offset + t.nbytes]}
        for t in planned(found, 0)
    }
    text = json.dumps(said, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def with_repacked(checkpoint: Checkpoint, names: Iterable[str]) -> tuple[Checkpoint, list[Piece]]:
    """The checkpoint as if it held what these matrices need besides, and the pieces that are to be written for that."""
    wanted = dict.fromkeys(n for n in names if n in checkpoint.matrices)
    found = list(pieces(map(checkpoint.matrices.__getitem__, wanted), checkpoint))
    tensors = {t.name: t for t in planned(found, len(header(found)))}
    if found and FILE in [s.file for s in checkpoint.shards]:
        raise ExportError(f"the checkpoint has a {FILE}, as an export calls what it packs anew: give it another name")
    if taken := [n for n in tensors if n in checkpoint.tensors]:
        raise ExportError(f"the checkpoint has a tensor {show_name(taken[0])}, as an export calls what it packs anew")
    return replace(checkpoint, tensors={**checkpoint.tensors, **tensors}), found


def write_repacked(found: list[Piece], folder: Path, *, whole: bool) -> tuple[WeightFile, Held]:
    """Writes the file into a folder that has none; never more than one tensor is in memory."""
    path = folder / FILE
    check_space(folder, sum(p.nbytes for p in found), "pack", "free space, or choose another disk")
    with write_errors(folder), open(path, "xb") as file:
        file.write(header(found))
        for piece in found:
            interrupt.check()
            file.write(np.ascontiguousarray(piece.make()).data)
    return identify(path, read_header(path)[1], "repacked", whole=whole)


def _numbers(matrix: Matrix, places: np.ndarray | None, unsigned: bool, read: Read) -> np.ndarray:
    """The transpose [columns, rows], its rows in the order of `places`, signed unless they are `unsigned`."""
    bits = matrix.bits
    numbers = unpack(read(matrix.values), matrix.shape, bits, matrix.layout).T
    if places is not None:
        numbers = numbers[places]
    if matrix.number.startswith("u") and not unsigned:
        # Two's complement of what lies above the middle.
        numbers = numbers ^ (1 << (bits - 1))
    return pack(numbers) if bits == 4 else numbers


def _zeros(matrix: Matrix, read: Read) -> Callable[[], np.ndarray] | None:
    """Makes the zero points [groups, rows]; None if all are the middle, which a signed number is without one."""
    if matrix.zeros is None:
        return None
    points = matrix.zero_points(read).T.astype(np.uint8)
    if (points == matrix.offset).all():
        return None
    return partial(pack, points) if matrix.bits == 4 else partial(np.asarray, points)


def _places(matrix: Matrix, read: Read) -> np.ndarray | None:
    """The columns by their groups, and within one in their order; None if they lie so."""
    if matrix.order is None:
        return None
    groups, size = read(matrix.order), matrix.scales.block[1]
    expected = np.arange(groups.size) // size
    if (groups == expected).all():
        return None
    places = np.argsort(groups, kind="stable").astype(np.int64)
    if (groups[places] != expected).any():
        raise ExportError(f"{matrix.order}: not every group has {size} columns: download the weights again")
    return places
