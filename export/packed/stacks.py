"""What an op reads of matrices in few bits: all their numbers, or scales, one matrix behind the other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto
from onnx.helper import make_node

from llmexport.export.checkpoint import Checkpoint
from llmexport.export.packed.made import FLOAT, Made
from llmexport.export.packed.matrix import EXPONENTS, Matrix, in_float32
from llmexport.export.packed.nodes import external
from llmexport.export.packed.repack import GRID, POINTS, ROWS
from llmexport.export.spec import Role
from llmexport.export.stored_tensor import StoredTensor
from llmexport.plugins.dtypes import BY_NAME, BY_SAFETENSORS

if TYPE_CHECKING:
    from llmexport.export.weights import Parameter

JOINED = "/rows"  # ends the name of what is joined for a parameter


@dataclass(frozen=True)
class Part:
    """What is read of one matrix: a tensor, and the shape and type that its bytes are numbers of."""

    tensor: StoredTensor
    shape: tuple[int, ...]
    dtype: str

    def read(self, checkpoint: Checkpoint) -> np.ndarray:
        stored = np.ascontiguousarray(checkpoint.read(self.tensor.name)).reshape(-1)
        return stored.view(np.uint8 if self.dtype == "uint8" else stored.dtype).reshape(self.shape)


def part(matrix: Matrix, role: Role, dtype: str, tensors: Mapping[str, StoredTensor]) -> Part:
    """The part of a matrix in a parameter of this role and type."""
    rows, columns = matrix.shape

    def held(name: str, shape: tuple[int, ...]) -> Part:
        own = BY_SAFETENSORS[tensors[name].dtype].name
        return Part(tensors[name], shape, "uint8" if dtype == "uint8" or own in EXPONENTS else own)

    if role == "values":
        anew = matrix.name + ROWS
        return held(anew if anew in tensors else matrix.values, (rows, columns * matrix.bits // 8))
    if role == "scales":
        anew = matrix.name + GRID
        return held(anew if anew in tensors else matrix.scales.name, matrix.grid)
    if role == "factors":
        assert matrix.scales.second
        return held(matrix.scales.second, (1,))
    return held(matrix.name + POINTS, matrix.grid)


def stack(parameter: Parameter, checkpoint: Checkpoint) -> Made:
    """What makes a parameter of its parts: runtimes fold it when they load, and the numbers stay packed.

    No node does where the bytes of one tensor are the parameter's, which is read by that one's name then.
    """
    made, name = Made(), parameter.name
    if one := _in_place(parameter, checkpoint):
        made.initializers.append(one)
        return made
    matrices = [checkpoint.matrices[n] for n in parameter.parts]
    parts = [part(m, parameter.role, parameter.dtype, checkpoint.tensors) for m in matrices]
    made.initializers += [external(p.tensor, p.shape, BY_NAME[p.dtype].onnx) for p in parts]
    value = made.node("Concat", [p.tensor.name for p in parts], name + JOINED, axis=0)
    if parameter.dtype == "F":
        value = _in_float32(made, value, name, parts[0].dtype, inverse=_inverse(parameter, matrices))
    if times := _repeats(matrices[0], parameter.role):
        rows, groups = len(parts) * parts[0].shape[0], parts[0].shape[1]
        apart = made.constant(f"{name}/apart", np.array([rows, 1, groups], np.int64))
        each = made.constant(f"{name}/each", np.array([rows, times, groups], np.int64))
        value = made.node("Reshape", [value, apart], f"{name}/blocks")
        value = made.node("Expand", [value, each], f"{name}/repeated")
    shape = made.constant(f"{name}/shape", np.array(parameter.shape, np.int64))
    # All experts of a stack share its factor.
    kind = "Expand" if parameter.role == "factors" and matrices[0].experts else "Reshape"
    made.nodes.append(make_node(kind, [value, shape], [name], f"{name}/stack"))
    return made


def values(parameter: Parameter, checkpoint: Checkpoint) -> np.ndarray:
    """The same as an array."""
    matrices = [checkpoint.matrices[n] for n in parameter.parts]
    read = [part(m, parameter.role, parameter.dtype, checkpoint.tensors).read(checkpoint) for m in matrices]
    whole = np.concatenate(read)
    if parameter.dtype == "F":
        whole = in_float32(whole)
        whole = 1 / whole if _inverse(parameter, matrices) else whole
    if parameter.role == "factors" and matrices[0].experts:
        return np.broadcast_to(whole, parameter.shape)
    times = _repeats(matrices[0], parameter.role)
    return (np.repeat(whole, times, 0) if times else whole).reshape(parameter.shape)


def _in_place(parameter: Parameter, checkpoint: Checkpoint) -> TensorProto | None:
    """The one tensor whose bytes are the parameter's, as an initialiser, if there is one."""
    if len(parameter.parts) > 1:
        return None
    matrix = checkpoint.matrices[parameter.parts[0]]
    own = part(matrix, parameter.role, parameter.dtype, checkpoint.tensors)
    made = parameter.dtype == "F" and (own.dtype != "float32" or _inverse(parameter, [matrix]))
    if made or math.prod(own.shape) != math.prod(parameter.shape):
        return None
    return external(own.tensor, parameter.shape, BY_NAME[own.dtype].onnx)


def _in_float32(made: Made, value: str, name: str, dtype: str, *, inverse: bool) -> str:
    if dtype == "uint8":
        value = made.powers(value, name)
    elif dtype != "float32":
        value = made.node("Cast", [value], f"{name}/wide", to=FLOAT)
    return made.node("Reciprocal", [value], f"{name}/inverse") if inverse else value


def _inverse(parameter: Parameter, matrices: list[Matrix]) -> bool:
    return parameter.role == "factors" and matrices[0].scales.divides


def _repeats(matrix: Matrix, role: Role) -> int | None:
    """How many rows share a scale, if several do."""
    times = math.ceil(matrix.shape[0] / matrix.grid[0])
    return times if role in ("scales", "zeros") and times > 1 else None
