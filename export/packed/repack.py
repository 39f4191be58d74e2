"""What no runtime reads as it is published, packed anew: one tensor at a time, in a file beside the weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmexport.export import interrupt
from llmexport.export.checkpoint import Checkpoint, read_header
from llmexport.export.errors import ExportError
from llmexport.export.identity import Held, WeightFile, identify
from llmexport.export.output import write_errors
from llmexport.export.packed.matrix import Matrix, Read, pack, unpack
from llmexport.export.placing import check_space
from llmexport.export.stored_tensor import StoredTensor
from llmexport.export.values import show_name
from llmexport.export.weight_layout import laid_out, unplaced
from llmexport.plugins.dtypes import BY_NAME, BY_SAFETENSORS

if TYPE_CHECKING:
    from llmexport.export.weights import Parameter

FILE = "repacked.safetensors"
# What is made of a matrix NAME; the numbers are its transpose.
NUMBERS, ZEROS, PLACES, RANKS = "/numbers", "/zeros", "/places", "/ranks"
# And of one that is read in a stack: numbers, scales and zero points [rows, ...].
ROWS, GRID, POINTS = "/rows", "/grid", "/points"

# Columns of a transpose that are copied at once: four times as fast as all, which no cache holds.
STRIP = 16


@dataclass(frozen=True)
class Piece:
    """A tensor to be written: its bytes are made when it is its turn, of what the checkpoint holds by then, those of a
    stack [experts, ...] maybe as what is mapped, turned."""

    tensor: StoredTensor
    make: Callable[[Read], np.ndarray]


def pieces(matrices: Iterable[Matrix], checkpoint: Checkpoint) -> Iterator[Piece]:
    """What has to be packed anew for a graph to read these. Raises ExportError on groups that are none."""
    byte, place = BY_NAME["uint8"], BY_NAME["int64"]
    for matrix in matrices:
        rows, columns = matrix.shape
        places, zeros = places_of(matrix, checkpoint.read), has_zeros(matrix, checkpoint.read)
        anew = matrix.layout != "rows" or places is not None
        if (anew or zeros) and rows * matrix.bits % 8:
            raise ExportError(f"{matrix.name} has {rows} rows, which bytes of two numbers do not fill")
        width = rows * matrix.bits // 8
        if anew:
            numbers = partial(_numbers, matrix, places, zeros)
            yield Piece(unplaced(matrix.name + NUMBERS, byte, (columns, width)), numbers)
        if places is not None:
            yield Piece(unplaced(matrix.name + PLACES, place, (columns,)), partial(_constant, places))
            yield Piece(unplaced(matrix.name + RANKS, place, (columns,)), partial(_constant, np.argsort(places)))
        if zeros:
            yield Piece(unplaced(matrix.name + ZEROS, byte, (matrix.grid[1], width)), partial(_zeros, matrix))


def stack_pieces(matrix: Matrix, checkpoint: Checkpoint, *, zeros: bool) -> Iterator[Piece]:
    """What has to be packed anew for a stack to have this matrix, with zero points or without."""
    byte, (rows, columns) = BY_NAME["uint8"], matrix.shape
    if matrix.layout != "rows" or matrix.number == "int4":
        numbers = unplaced(matrix.name + ROWS, byte, (rows, columns * matrix.bits // 8))
        yield Piece(numbers, partial(_rows, matrix))
    if matrix.scales.turned:
        scales = checkpoint.tensors[matrix.scales.name]
        turned = unplaced(matrix.name + GRID, BY_SAFETENSORS[scales.dtype], matrix.grid)
        yield Piece(turned, partial(_turned, matrix))
    if zeros:
        yield Piece(unplaced(matrix.name + POINTS, byte, matrix.grid), partial(_points, matrix))


def joined(wanted: Iterable[Parameter], checkpoint: Checkpoint) -> Iterator[Piece]:
    """What is published in several tensors of floats, or otherwise than it is read, or is to be joined of matrices, as
    one of the parameter's own name."""
    parameters = {p.name: p for p in wanted if p.parts}.values()
    for parameter in (p for p in parameters if p.join and p.role):
        dtype = BY_NAME["float32" if parameter.dtype == "F" else parameter.dtype]
        matrices = [checkpoint.matrices[n] for n in parameter.parts]
        yield Piece(unplaced(parameter.name, dtype, parameter.shape), partial(_in_turn, parameter, matrices))
    for parameter in (p for p in parameters if checkpoint.matrices.keys().isdisjoint(p.parts)):
        dtypes = {checkpoint.tensors[n].dtype for n in parameter.parts}
        # Others than of one type are refused when they are bound.
        if len(dtypes) == 1:
            whole = unplaced(parameter.name, BY_SAFETENSORS[dtypes.pop()], parameter.shape)
            yield Piece(whole, partial(_joined, parameter))


@dataclass(frozen=True)
class Repacked:
    """The file of these pieces: its header, and the pieces with their places behind it."""

    header: bytes
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        return sum(p.tensor.nbytes for p in self.pieces)

    def write(self, folder: Path, read: Read, *, whole: bool) -> tuple[WeightFile, Held]:
        """Writes the file into a folder that has none, of tensors that `read` gives; no more than one is in memory, or
        than one expert's part."""
        path = folder / FILE
        check_space(folder, self.nbytes, "pack", "free space, or choose another disk")
        with write_errors(folder), open(path, "xb") as file:
            file.write(self.header)
            for piece in self.pieces:
                file.seek(piece.tensor.offset)
                made = piece.make(read)
                for part in made if made.ndim > 2 else (made,):
                    interrupt.check()
                    # Of bfloat16 numpy gives no buffer.
                    file.write(_in_order(part).reshape(-1).view(np.uint8).data)
        return identify(path, read_header(path)[1], "repacked", whole=whole)


def _in_order(array: np.ndarray) -> np.ndarray:
    """Its numbers as they lie in a file."""
    if array.ndim != 2 or array.flags.c_contiguous:
        return np.ascontiguousarray(array)
    made = np.empty(array.shape, array.dtype)
    for at in range(0, array.shape[1], STRIP):
        made[:, at : at + STRIP] = array[:, at : at + STRIP]
    return made


def with_repacked(
    checkpoint: Checkpoint, wanted: Collection[Parameter], *, join: bool = False
) -> tuple[Checkpoint, Repacked | None]:
    """The checkpoint as if it held what these need besides, and the file that is to be written for that.

    join: of what lies in several tensors, as experts one by one, it holds one.
    """
    roles: dict[str, set[str]] = {}
    for parameter in (p for p in wanted if not p.join):
        for name in checkpoint.matrices.keys() & {*parameter.sources}:
            roles.setdefault(name, set()).add(parameter.role)
    found: list[Piece] = []
    for name, matrix in checkpoint.matrices.items():
        if own := roles.get(name):
            whole = pieces([matrix], checkpoint) if "" in own else ()
            stacked = stack_pieces(matrix, checkpoint, zeros="zeros" in own) if "values" in own else ()
            found += (*whole, *stacked)
    found += joined(wanted, checkpoint) if join else ()
    if not found:
        return checkpoint, None
    if FILE in [s.file for s in checkpoint.shards]:
        raise ExportError(f"the checkpoint has a {FILE}, as an export calls what it packs anew: give it another name")
    header, at = laid_out(FILE, (p.tensor for p in found))
    if taken := [n for n in at if n in checkpoint.tensors]:
        raise ExportError(f"the checkpoint has a tensor {show_name(taken[0])}, as an export calls what it packs anew")
    placed = tuple(replace(p, tensor=at[p.tensor.name]) for p in found)
    return replace(checkpoint, tensors={**checkpoint.tensors, **at}), Repacked(header, placed)


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


def _constant(array: np.ndarray, read: Read) -> np.ndarray:
    return array


def _joined(parameter: Parameter, read: Read) -> np.ndarray:
    """Floats of all experts, as they are read."""
    every = [read(n) for n in parameter.parts]
    # What is mapped and turned alone is copied expert by expert, as it is written.
    made = every[0] if len(every) == 1 else np.concatenate(every)
    made = made.swapaxes(1, 2) if parameter.turned else made.reshape(parameter.shape)
    return _alternating(made, parameter.join) if parameter.join > 1 else made


def _alternating(made: np.ndarray, matrices: int) -> np.ndarray:
    """[experts, rows / matrices, matrices, columns]: in turn the rows of so many matrices, one below the other in each
    of [experts, rows, columns]."""
    experts, rows, columns = made.shape
    return made.reshape(experts, matrices, rows // matrices, columns).swapaxes(1, 2)


def _in_turn(parameter: Parameter, matrices: list[Matrix], read: Read) -> np.ndarray:
    """Of all experts what their matrices have of this role, the rows of those of one expert in turn."""
    make = {"values": _rows, "scales": Matrix.grid_of_scales, "zeros": _points}[parameter.role]
    made = np.stack([make(m, read) for m in matrices])
    return _alternating(made.reshape(parameter.shape), parameter.join)


def _rows(matrix: Matrix, read: Read) -> np.ndarray:
    """The unsigned numbers along each row; those of a stack [experts, rows, bytes]."""
    if matrix.layout == "stacked":
        return read(matrix.values).swapaxes(1, 2)
    numbers = unpack(read(matrix.values), matrix.shape, matrix.bits, matrix.layout)
    numbers = numbers if matrix.number.startswith("u") else numbers ^ (1 << (matrix.bits - 1))
    return pack(numbers) if matrix.bits == 4 else numbers


def _turned(matrix: Matrix, read: Read) -> np.ndarray:
    return matrix.turned(read(matrix.scales.name))


def _points(matrix: Matrix, read: Read) -> np.ndarray:
    """The zero points [rows, groups], a byte each."""
    return np.broadcast_to(matrix.zero_points(read).astype(np.uint8), matrix.grid)


def has_zeros(matrix: Matrix, read: Read) -> bool:
    """Whether zero is another number than the middle, which a signed number is without a zero point."""
    return matrix.zeros is not None and bool((matrix.zero_points(read) != matrix.offset).any())


def _zeros(matrix: Matrix, read: Read) -> np.ndarray:
    """The zero points [groups, rows]."""
    points = matrix.zero_points(read).T.astype(np.uint8)
    return pack(points) if matrix.bits == 4 else points


def places_of(matrix: Matrix, read: Read) -> np.ndarray | None:
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
