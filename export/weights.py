"""Binds a model's parameters to the tensors of a checkpoint: each one, once, where it lies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch

import numpy as np
import onnx
from onnx import TensorProto

from llmexport.export import quantised
from llmexport.export.checkpoint import Checkpoint
from llmexport.export.errors import ExportError
from llmexport.export.packed import nbits
from llmexport.export.packed.bind import bind_matrices, external, value_of
from llmexport.export.packed.matrix import Matrix
from llmexport.export.packed.read import spare
from llmexport.export.packed.stacks import stack
from llmexport.export.spec import ANY_FLOAT, Role
from llmexport.export.stored_products import read_as_stored
from llmexport.export.stored_tensor import StoredTensor
from llmexport.export.values import show_name, visible
from llmexport.plugins.dtypes import BY_NAME, BY_ONNX, BY_SAFETENSORS, FLOATS

FEW = "few bits"
LISTED = 10  # names in an error before "and N more"


@dataclass(frozen=True)
class Parameter:
    """A weight that the model wants: its name in the checkpoint and its shape.

    `parts` are the tensors it is made of, stacked in this order, where the checkpoint has no such tensor.
    `dtype`, `group`, `role`, `join` and `turned` are those of Stored; with a role, the parts are matrices in few bits.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...] = ()
    dtype: str = "T"
    group: int | None = None
    role: Role = ""
    join: int = 0
    turned: bool = False

    def cast(self, dtype: int) -> int | None:
        """The ONNX type that it is cast to in a model of `dtype`; None if the graph takes it as it is stored."""
        return {"T": dtype, "F": int(TensorProto.FLOAT)}.get(self.dtype)

    @property
    def sources(self) -> tuple[str, ...]:
        return self.parts or (self.name,)

    @property
    def part_shape(self) -> tuple[int, ...]:
        """The shape of each of its sources."""
        return (self.shape[0] * self.shape[1] // len(self.parts), *self.shape[2:]) if self.parts else self.shape

    @property
    def grouped_shape(self) -> tuple[int, ...]:
        """The same with groups apart, if it has any."""
        if not self.group:
            return self.part_shape
        *others, last = self.part_shape
        return (*others, last // self.group, self.group)


def check(
    wanted: Mapping[str, Parameter],
    checkpoint: Checkpoint,
    ignore: tuple[str, ...],
    whole: bool,
    head: str = "",
    tower: tuple[str, ...] = (),
) -> None:
    """Refuses a checkpoint that lacks a parameter, has it in another shape or type, or holds more.

    `wanted` is by checkpoint name. Only a `whole` model must use every tensor; one that fits a pattern of
    `ignore` may be left over. `head` is the name that a base model lacks; `tower` are patterns of what the text model
    does without. Raises ExportError.
    """
    stored = checkpoint.tensors
    # Matrices of a role were held against it when the model was given it.
    sources = {n: p for p in wanted.values() for n in p.sources if not p.role}
    every = {n for p in wanted.values() for n in p.sources}
    used = {held for n in every for held in checkpoint.holders(n)}
    used |= spare(checkpoint, used)
    unused = [n for n in stored if n not in used and not any(fnmatch(n, p) for p in ignore)]
    names = checkpoint.names
    missing = [n for n in sources if n not in names]
    if missing:
        raise ExportError(_lacks(missing, unused, checkpoint, head) + _way_out(missing, tower))
    for name, parameter in sources.items():
        matrix = checkpoint.matrices.get(name)
        if problem := _unfit(parameter, matrix) if matrix else _problem(parameter, stored[name]):
            raise ExportError(
                quantised.found([name], unused, stored, checkpoint.folder) or problem + _way_out([name], tower)
            )
    if whole and unused:
        raise ExportError(
            f"checkpoint holds {len(unused)} tensors that this architecture does not use: {_some(unused)}. "
            f"Leaving them out could give a wrong model: is --arch right?{_way_out(unused, tower)}"
        )


def _way_out(names: list[str], tower: tuple[str, ...]) -> str:
    """What to do where nothing but the tower is wrong."""
    of_tower = all(any(fnmatch(n, p) for p in tower) for n in names)
    return " (--part text leaves the tower out)" if of_tower else ""


def _lacks(missing: list[str], unused: list[str], checkpoint: Checkpoint, head: str) -> str:
    """Why tensors may be missing, and what to do."""
    if said := quantised.found(missing[:LISTED], unused, checkpoint.tensors, checkpoint.folder):
        return said
    lacks = f"checkpoint lacks {len(missing)} tensors that its config.json asks for: {_some(missing)}. "
    if missing == [head]:
        return f"{lacks}A base model has no head that gives logits: take the whole model that it is the base of"
    if other := next((n for n in unused if n.endswith("." + missing[0])), None):
        start = other.removesuffix(missing[0])
        return (
            f"{lacks}Names start with {show_name(start)} there: take that away, or save the model without its wrapper"
        )
    return lacks + "Is config.json from the same model, and is every shard there?"


def _problem(parameter: Parameter, stored: StoredTensor) -> str | None:
    """What is wrong with the shape or the type of a tensor."""
    shape = parameter.part_shape
    if stored.shape not in (shape, parameter.grouped_shape) or math.prod(stored.shape) != math.prod(shape):
        return (
            f"{stored.name} is {list(stored.shape)} in the checkpoint, config.json makes it "
            f"{list(shape)}: is config.json from the same model?"
        )
    types = [BY_NAME[n].safetensors for n in (FLOATS if parameter.dtype in ANY_FLOAT else (parameter.dtype,))]
    if stored.dtype not in types:
        return (
            f"{stored.name} is stored as {stored.dtype}; {', '.join(types)} can be exported here. "
            "Load and save it with transformers in one of these; of a quantised one take the model it was made from"
        )
    return None


def _unfit(parameter: Parameter, matrix: Matrix) -> str | None:
    """What is wrong with a matrix in few bits."""
    if parameter.dtype not in ("T", "W"):
        return f"{matrix.name} is quantised, and is no matrix of a product here: leave it in 16 bits"
    if matrix.shape != parameter.part_shape:
        return (
            f"{matrix.name} is {list(matrix.shape)} in the checkpoint once it is unpacked, config.json makes it "
            f"{list(parameter.part_shape)}: is config.json from the same model?"
        )
    return None


def stored_type(parameter: Parameter, checkpoint: Checkpoint, dtype: int) -> int:
    """The ONNX type that a parameter is stored in; `dtype` if in few bits, which are made numbers of that type.

    Raises ExportError if its parts differ in that.
    """
    if parameter.role:
        return int(TensorProto.FLOAT) if parameter.dtype == "F" else BY_NAME[parameter.dtype].onnx
    found = {FEW if n in checkpoint.matrices else checkpoint.tensors[n].dtype for n in parameter.sources}
    if len(found) > 1:
        raise ExportError(
            f"the parts of {parameter.name} are stored as {', '.join(sorted(found))}: convert them to one"
        )
    [one] = found
    return dtype if one == FEW else BY_SAFETENSORS[one].onnx


def bind(
    model: onnx.ModelProto,
    wanted: Mapping[str, Parameter],
    checkpoint: Checkpoint,
    dtype: int,
    target: str = "portable",
) -> None:
    """Turns the graph inputs named in `wanted` into external initialisers that point into the shards, in place.

    A tensor stored in another type than the graph wants, `dtype` if it does not say, gets a Cast; one in parts
    is put together by a Concat. Runtimes fold both when they load. A Transpose or Gather of a narrower tensor comes
    before its Cast: ONNX Runtime keeps what it folds on the way, and so keeps it narrow, or casts the rows it gathers.
    A matrix in few bits is made by nodes (packed/). In the form for ONNX Runtime products read both as they are stored.
    """
    graph = model.graph
    kept = [v for v in graph.input if v.name not in wanted]
    del graph.input[:]
    graph.input.extend(kept)
    direct = target == "onnxruntime" and dtype == TensorProto.FLOAT
    made = bind_matrices(graph, wanted, checkpoint, dtype, direct)
    if direct:
        read_as_stored(graph, {n for n, p in wanted.items() if made.keys().isdisjoint(p.sources)})
    if {n.domain for n in graph.node} - {o.domain for o in model.opset_import} == {nbits.DOMAIN}:
        model.opset_import.add(domain=nbits.DOMAIN, version=1)
    types = {n: stored_type(p, checkpoint, dtype) for n, p in wanted.items()}
    recast = {n: to for n, p in wanted.items() if not p.role and (to := p.cast(dtype)) not in (types[n], None)}
    narrow = {n for n, to in recast.items() if BY_ONNX[types[n]].bits < BY_ONNX[to].bits}
    read = {name for node in graph.node for name in node.input[1 if _moves(node, narrow) else 0 :]}
    nodes: list[onnx.NodeProto] = []
    stands: dict[str, str] = {}
    for name, parameter in wanted.items():
        if parameter.role:
            made_here = stack(parameter, checkpoint)
            graph.initializer.extend(made_here.initializers)
            nodes += made_here.nodes
            stands[name] = made_here.nodes[-1].output[0] if made_here.nodes else made_here.initializers[0].name
            graph.value_info.append(onnx.helper.make_tensor_value_info(stands[name], types[name], parameter.shape))
            continue
        plain = (checkpoint.tensors[n] for n in parameter.sources if n not in made)
        graph.initializer.extend(external(t, parameter.part_shape, BY_SAFETENSORS[t.dtype].onnx) for t in plain)
        nodes += [node for n in parameter.sources for node in made.get(n, ())]
        if parameter.parts:
            rows, shape = f"{name}/rows", f"{name}/shape"
            graph.initializer.append(onnx.numpy_helper.from_array(np.array(parameter.shape, np.int64), shape))
            parts = [value_of(n) if n in made else n for n in parameter.parts]
            nodes.append(onnx.helper.make_node("Concat", parts, [rows], name=rows, axis=0))
            nodes.append(onnx.helper.make_node("Reshape", [rows, shape], [name], name=f"{name}/stack"))
            graph.value_info.append(onnx.helper.make_tensor_value_info(name, types[name], list(parameter.shape)))
        if name in recast.keys() & read:
            to = recast[name]
            nodes.append(_cast(name, f"{name}/cast", to))
            graph.value_info.append(onnx.helper.make_tensor_value_info(f"{name}/cast", to, list(parameter.shape)))
    for node in graph.node:
        nodes.append(node)
        if _moves(node, narrow):
            moved = node.output[0]
            node.output[0] = f"{moved}/stored"
            nodes.append(_cast(node.output[0], moved, recast[node.input[0]]))
        else:
            node.input[:] = [f"{n}/cast" if n in recast else stands.get(n, n) for n in node.input]
    del graph.node[:]
    graph.node.extend(nodes)


def _moves(node: onnx.NodeProto, weights: set[str]) -> bool:
    """Whether a node moves numbers of one of these weights, its first input, and computes nothing."""
    return node.op_type in ("Transpose", "Gather") and not node.domain and node.input[0] in weights


def _cast(name: str, result: str, dtype: int) -> onnx.NodeProto:
    return onnx.helper.make_node("Cast", [name], [result], name=f"{name}/cast", to=dtype)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(map(visible, names[:LISTED])) + more
