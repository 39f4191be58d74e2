"""Weights beside a plan: of what each weight input of an engine is made, and how, once, when it is bound.

Needs numpy and ml_dtypes, and neither torch nor TensorRT: it runs where an engine runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmexport.export.checkpoint import read_header
from llmexport.export.errors import EngineError
from llmexport.export.identity import WeightFile, examine
from llmexport.export.stamp import Stamp, check_stamp, read_errors
from llmexport.export.stored_tensor import StoredTensor
from llmexport.plugins.dtypes import BY_NAME, BY_SAFETENSORS

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Source:
    """A tensor in a weight file, and the dtype and shape that its bytes are read as; offset: from the file's start."""

    tensor: str
    file: str
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BY_NAME[self.dtype].bits // 8


@dataclass(frozen=True)
class Operation:
    """One step from stored tensors to a weight. to: the axis of a concat, the dtype of a cast, the order of axes of a
    transpose, the shape of a reshape, the axis, first and last + 1 of a slice."""

    do: Literal["concat", "cast", "transpose", "reshape", "slice"]
    to: int | str | tuple[int, ...]


@dataclass(frozen=True)
class Binding:
    """What a weight input takes: the sources, and what is done with them, in order. Where nothing but a reshape is,
    the mapped bytes are what is bound."""

    dtype: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    operations: tuple[Operation, ...]

    @property
    def as_stored(self) -> bool:
        return all(operation.do == "reshape" for operation in self.operations)


def weights(
    bindings: Mapping[str, Binding], files: Iterable[WeightFile], folder: Path
) -> Iterator[tuple[str, np.ndarray]]:
    """The array of each weight input by name, from the weight files in `folder`, one at a time.

    An array as stored is the file, mapped read-only; the others are made when their turn comes, in memory. files: as
    engine.json describes them. Raises ExportError if one is missing or another than was exported, as far as header, 64
    pages and stamp tell, and EngineError on a binding that does not fit it.
    """
    used = {source.file for binding in bindings.values() for source in binding.sources}
    said = {file.file: file for file in files}
    if unknown := sorted(used - said.keys()):
        raise EngineError(f"engine.json binds weights of {unknown[0]}, which it does not describe: build it again")
    stamps = {name: examine(folder / name, said[name], moved=True).stamp for name in sorted(used)}
    stored = {name: read_header(folder / name)[0] for name in stamps}
    for name, binding in bindings.items():
        for source in binding.sources:
            _check(name, source, stored[source.file].get(source.tensor))
    for name, binding in bindings.items():
        yield name, _made(name, binding, folder, stamps)


def _check(name: str, source: Source, stored: StoredTensor | None) -> None:
    own = stored and BY_SAFETENSORS[stored.dtype].name
    read_as = (own, "int8") if own == "uint8" else (own,)
    if (
        stored is None
        or source.dtype not in read_as
        or (stored.offset, stored.nbytes) != (source.offset, source.nbytes)
    ):
        what = f"{source.tensor} from byte {source.offset} of {source.file} on, {source.dtype} {list(source.shape)}"
        raise EngineError(f"engine.json binds {name} to {what}: it is not there, build it again")


def _mapped(source: Source, folder: Path, seen: Stamp) -> np.ndarray:
    import ml_dtypes  # noqa: F401  teaches np.dtype its names
    import numpy as np

    path = folder / source.file
    with read_errors(path):
        check_stamp(path, seen, path)
        return np.memmap(path, np.dtype(source.dtype), "r", source.offset, source.shape)


def _made(name: str, binding: Binding, folder: Path, stamps: Mapping[str, Stamp]) -> np.ndarray:
    """What the operations make of the sources. Raises EngineError if it is not what the binding says."""
    import numpy as np

    try:
        parts = [_mapped(source, folder, stamps[source.file]) for source in binding.sources]
        for operation in binding.operations:
            to: Any = operation.to
            match operation.do:
                case "concat":
                    parts = [np.concatenate(parts, to)]
                case "cast":
                    parts = [p.astype(np.dtype(to)) for p in parts]
                case "transpose":
                    parts = [np.ascontiguousarray(p.transpose(to)) for p in parts]
                case "reshape":
                    parts = [p.reshape(to) for p in parts]
                case "slice":
                    axis, first, end = to
                    parts = [np.ascontiguousarray(p[(*(slice(None),) * axis, slice(first, end))]) for p in parts]
        [made] = parts
    except (TypeError, ValueError) as error:
        raise EngineError(f"engine.json cannot make {name} as it says ({error}): build it again") from error
    if (made.dtype.name, made.shape) != (binding.dtype, binding.shape):
        says = f"{binding.dtype} {list(binding.shape)}"
        raise EngineError(
            f"engine.json says {name} is {says}, and makes {made.dtype} {list(made.shape)}: build it again"
        )
    return made
