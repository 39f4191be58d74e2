"""The files of a checkpoint that is quantised on its way into an export: planned from headers, written in chunks."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import ml_dtypes  # noqa: F401  teaches np.dtype "bfloat16"
import numpy as np

from llmexport.export import interrupt
from llmexport.export.checkpoint import SINGLE, Checkpoint, read_header
from llmexport.export.errors import ExportError
from llmexport.export.identity import Held, WeightFile, identify
from llmexport.export.output import write_errors
from llmexport.export.placing import reading
from llmexport.export.progress import Progress
from llmexport.export.rounding import Rounding
from llmexport.export.stored_tensor import StoredTensor
from llmexport.export.values import show_name
from llmexport.export.weight_layout import laid_out, unplaced
from llmexport.plugins.dtypes import BY_NAME, BY_SAFETENSORS

CHUNK = 2**20  # numbers in memory at a time, or one row, or one of blocks


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of a checkpoint, and those that are written in its place: the numbers, scales and, where numbers are
    packed, the shape. `size` is how many columns share a scale; None where the tensor is copied."""

    source: StoredTensor
    size: int | None
    tensors: tuple[StoredTensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)


@dataclass(frozen=True)
class File:
    """A file of weights: its header, the length included, and the pieces that lie behind it."""

    name: str
    header: bytes
    pieces: tuple[Piece, ...]


def planned(
    tensors: Iterable[StoredTensor], sizes: Mapping[str, int], rounding: Rounding, limit: int
) -> tuple[File, ...]:
    """Files of at most `limit` bytes, or of one tensor, for these; those that `sizes` name are rounded."""
    shards: list[list[Piece]] = [[]]
    room = limit
    for tensor in tensors:
        size = sizes.get(tensor.name)
        written = (dataclasses.replace(tensor, turned=0, coded=None),)
        piece = Piece(tensor, size, written if size is None else _in_its_place(tensor, size, rounding))
        if shards[-1] and piece.nbytes > room:
            shards.append([])
            room = limit
        shards[-1].append(piece)
        room -= piece.nbytes
    count = len(shards)
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)] if count > 1 else [SINGLE]
    return tuple(map(_placed, names, shards))


def _in_its_place(tensor: StoredTensor, size: int, rounding: Rounding) -> tuple[StoredTensor, ...]:
    (rows, columns), module = tensor.shape, tensor.name.removesuffix(".weight")
    made = [
        (rounding.ending, BY_NAME[rounding.stored], (rows, columns // rounding.in_item)),
        (".weight_scale", BY_SAFETENSORS[tensor.dtype], (rows, columns // size)),
        (".weight_shape", BY_NAME["int64"], (2,)),
    ]
    return tuple(unplaced(module + ending, dtype, shape) for ending, dtype, shape in made[: 3 if rounding.packs else 2])


def _placed(name: str, pieces: list[Piece]) -> File:
    """The pieces with their places in a file."""
    header, at = laid_out(name, (t for p in pieces for t in p.tensors))
    placed = (dataclasses.replace(p, tensors=tuple(at[t.name] for t in p.tensors)) for p in pieces)
    return File(name, header, tuple(placed))


def write(
    files: tuple[File, ...],
    source: Checkpoint,
    rounding: Rounding,
    folder: Path,
    whole: bool,
    progress: Progress,
) -> list[tuple[WeightFile, Held]]:
    """Writes the files of the checkpoint `source` into a folder that has none of them."""
    stamps = {s.file: s.stamp for s in source.shards}
    for i, made in enumerate(files):
        progress(f"quantised weights ({len(files)} files)", i, len(files))
        with write_errors(folder), open(folder / made.name, "xb") as file:
            file.write(made.header)
            for piece in made.pieces:
                coded = piece.source.coded
                shards = coded.files if coded else {piece.source.file}
                with contextlib.ExitStack() as stack:
                    opened = {s: stack.enter_context(reading(source.folder / s, stamps[s])) for s in shards}
                    _write(piece, rounding, opened, file)
    progress(f"quantised weights ({len(files)} files)", len(files), len(files))
    paths = [folder / f.name for f in files]
    return [identify(path, read_header(path)[1], "quantised", whole=whole) for path in paths]


def _write(piece: Piece, rounding: Rounding, opened: Mapping[str, BinaryIO], file: BinaryIO) -> None:
    source = piece.source
    arrays = source.coded.rows(opened, CHUNK) if source.coded else _chunks(source, opened[source.file])
    scales: list[np.ndarray] = []
    if piece.size is not None:
        arrays = _rounded(source, arrays, rounding, piece.size, scales)
    file.seek(piece.tensors[0].offset)
    for array in arrays:
        interrupt.check()
        file.write(np.ascontiguousarray(array).view(np.uint8).data)
    beside = [np.concatenate(scales), np.array(source.shape, np.int64)] if scales else []
    for tensor, array in zip(piece.tensors[1:], beside, strict=False):
        file.seek(tensor.offset)
        file.write(array.view(np.uint8).data)


def _rounded(
    tensor: StoredTensor, arrays: Iterable[np.ndarray], rounding: Rounding, size: int, scales: list[np.ndarray]
) -> Iterator[np.ndarray]:
    """The numbers of rows; their scales are added to `scales`."""
    for rows in arrays:
        try:
            numbers, own = rounding.round(rows, size)
        except FloatingPointError as error:
            where = f"{tensor.file}: {show_name(tensor.name)}"
            raise ExportError(f"{where} holds a number that is not finite: download the weights again") from error
        scales.append(own)
        yield numbers


def _chunks(tensor: StoredTensor, stored: BinaryIO) -> Iterator[np.ndarray]:
    """The rows [N, C] of a matrix, some at a time; of what is no matrix its numbers [N, 1]."""
    dtype = np.dtype(BY_SAFETENSORS[tensor.dtype].name)
    columns = tensor.shape[1] if len(tensor.shape) == 2 else 1
    if tensor.turned:
        whole, height = tensor.mapped(stored, dtype), max(1, CHUNK // columns)
        yield from (np.ascontiguousarray(whole[at : at + height]) for at in range(0, len(whole), height))
        return
    size = max(1, CHUNK // columns) * columns * dtype.itemsize if tensor.nbytes else 0
    stored.seek(tensor.offset)
    for start in range(0, tensor.nbytes, size or 1):
        yield np.frombuffer(stored.read(min(size, tensor.nbytes - start)), dtype).reshape(-1, columns)
