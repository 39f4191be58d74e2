"""Binds a model's parameters to the tensors of a checkpoint: each one, once, where it lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch

import numpy as np
import onnx
from onnx import TensorProto

from llmexport.export.checkpoint import Checkpoint, StoredTensor
from llmexport.export.errors import ExportError

ONNX_TYPES = {"F32": TensorProto.FLOAT, "F16": TensorProto.FLOAT16, "BF16": TensorProto.BFLOAT16}
PIECE = 2**24  # bytes compared at a time
LISTED = 10  # names in an error before "and N more"


@dataclass(frozen=True)
class Parameter:
    """A weight that the model wants: its name in the checkpoint and its shape."""

    name: str
    shape: tuple[int, ...]


def check(wanted: Mapping[str, Parameter], checkpoint: Checkpoint, ignore: tuple[str, ...], whole: bool) -> None:
    """Refuses a checkpoint that lacks a parameter, has it in another shape or type, or holds more.

    `wanted` is by checkpoint name. Only a `whole` model must use every tensor; one that fits a pattern of
    `ignore` may be left over. Raises ExportError.
    """
    stored = checkpoint.tensors
    missing = [n for n in wanted if n not in stored]
    if missing:
        raise ExportError(
            f"checkpoint lacks {len(missing)} tensors that its config.json asks for: {_some(missing)}. "
            "Is config.json from the same model, and is every shard there?"
        )
    for name, parameter in wanted.items():
        _check_tensor(parameter, stored[name])
    unused = [n for n in stored if n not in wanted and not any(fnmatch(n, p) for p in ignore)]
    if whole and unused:
        raise ExportError(
            f"checkpoint holds {len(unused)} tensors that this architecture does not use: {_some(unused)}. "
            "Leaving them out could give a wrong model: is --arch right?"
        )


def check_tied(copy: str, original: str, checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint stores a tied weight a second time, as `copy`.

    Raises ExportError if the two differ: the model would not be the one that config.json describes.
    """
    if copy not in checkpoint.tensors or original not in checkpoint.tensors:
        return False
    first, second = (checkpoint.tensors[n] for n in (original, copy))
    alike = (first.dtype, first.shape) == (second.dtype, second.shape)
    if not alike or not _same_bits(checkpoint, original, copy):
        raise ExportError(
            f"config.json says tie_word_embeddings, but the checkpoint's {copy} is not its {original}: "
            "one of the two is wrong; set tie_word_embeddings to false if the head is its own"
        )
    return True


def _same_bits(checkpoint: Checkpoint, *names: str) -> bool:
    """Compared piece by piece: a table of 256,000 words is a gigabyte."""
    first, second = (checkpoint.read(n).reshape(-1).view(np.uint8) for n in names)
    pieces = range(0, first.size, PIECE)
    return all(np.array_equal(first[i : i + PIECE], second[i : i + PIECE]) for i in pieces)


def _check_tensor(parameter: Parameter, stored: StoredTensor) -> None:
    if stored.shape != parameter.shape:
        raise ExportError(
            f"{stored.name} is {list(stored.shape)} in the checkpoint, config.json makes it "
            f"{list(parameter.shape)}: is config.json from the same model?"
        )
    if stored.dtype not in ONNX_TYPES:
        raise ExportError(
            f"{stored.name} is stored as {stored.dtype}; {', '.join(ONNX_TYPES)} can be exported. "
            "Quantised checkpoints must be converted first"
        )


def bind(model: onnx.ModelProto, wanted: Mapping[str, Parameter], checkpoint: Checkpoint, dtype: int) -> None:
    """Turns the graph inputs named in `wanted` into external initialisers that point into the shards, in place.

    A tensor stored in another type than `dtype` gets a Cast, which runtimes fold when they load.
    """
    graph = model.graph
    kept = [v for v in graph.input if v.name not in wanted]
    del graph.input[:]
    graph.input.extend(kept)
    casts = {}
    for name in wanted:
        stored = checkpoint.tensors[name]
        graph.initializer.append(_external(stored))
        if ONNX_TYPES[stored.dtype] != dtype:
            casts[name] = f"{name}/cast"
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name in casts:
                node.input[i] = casts[name]
    nodes = [onnx.helper.make_node("Cast", [n], [c], name=c, to=dtype) for n, c in casts.items()]
    nodes.extend(graph.node)
    del graph.node[:]
    graph.node.extend(nodes)
    shapes = {n: wanted[n].shape for n in casts}
    graph.value_info.extend(
        onnx.helper.make_tensor_value_info(casts[n], dtype, list(shape)) for n, shape in shapes.items()
    )


def _external(stored: StoredTensor) -> TensorProto:
    tensor = TensorProto(name=stored.name, data_type=ONNX_TYPES[stored.dtype], dims=stored.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", stored.file), ("offset", stored.offset), ("length", stored.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _some(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
