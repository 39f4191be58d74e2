"""What weights the file of a graph is bound to, held against those that the manifest says."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

from llmexport.export.checkpoint import Checkpoint
from llmexport.export.exported import Export, ExportedGraph
from llmexport.export.packed import stacks
from llmexport.export.packed.nbits import Multiplier
from llmexport.export.spec import Step
from llmexport.export.stored_tensor import StoredTensor
from llmexport.export.wanted import load_parameters
from llmexport.export.weights import Parameter
from llmexport.plugins.dtypes import BY_NAME, BY_SAFETENSORS


def parameters(graph: ExportedGraph, model: onnx.ModelProto, checkpoint: Checkpoint) -> dict[str, dict[str, Parameter]]:
    """The weights of every step, by the path in its block; one of several tensors is called as in `model`."""
    rows = {n: node.output[0] for node in model.graph.node if node.op_type == "Concat" for n in node.input}
    stacked = {node.input[0]: node.output[0] for node in model.graph.node if node.op_type == "Reshape"}
    stored = {block: load_parameters(block) for block in graph.assembly.blocks}
    found: dict[str, dict[str, Parameter]] = {}
    for step in graph.assembly.steps:
        own = found[step.name] = {}
        for path, names in graph.step_weights[step.name].items():
            parts = () if isinstance(names, str) else tuple(names)
            held = stored[step.block][path]
            role = held.role if parts else ""
            if role:
                first = stacks.part(checkpoint.matrices[parts[0]], role, held.dtype, checkpoint.tensors)
                name = rows.get(first.tensor.name, first.tensor.name if len(parts) == 1 else "")
                name = name.removesuffix(stacks.JOINED)
            else:
                name = next((stacked[rows[p]] for p in parts if rows.get(p) in stacked), "")
            # No node has the name of a weight that the file does not put together.
            name = name or f"{step.path}{path}"
            own[path] = Parameter(name if parts else str(names), held.shape, parts, held.dtype, held.group, role)
    return found


def wrong(export: Export, graph: ExportedGraph, model: onnx.ModelProto) -> dict[str, str]:
    """By name, how each tensor that the file does not have as the checkpoint has it differs."""
    checkpoint = export.checkpoint()
    held = {t.name: t for t in model.graph.initializer}
    kinds: dict[str, int] = {}
    for own in parameters(graph, model, checkpoint).values():
        for parameter in own.values():
            for name in parameter.sources:
                kinds |= _kinds(checkpoint, name, parameter, held)
    found = {n: _differs(held.get(n), kind, checkpoint.tensors[n], checkpoint) for n, kind in kinds.items()}
    return {n: said for n, said in found.items() if said}


def reader(graph: ExportedGraph, checkpoint: Checkpoint, tensor: str) -> str:
    """The first step that has the tensor, or a matrix that is made of it."""

    def has(step: Step) -> bool:
        given = graph.step_weights[step.name].values()
        own = {n for names in given for n in ((names,) if isinstance(names, str) else names)}
        # What is packed anew is called after its matrix.
        return tensor.partition("/")[0] in own or any(tensor in checkpoint.holders(n) for n in own)

    return next(s.name for s in graph.assembly.steps if has(s))


def _kinds(
    checkpoint: Checkpoint, name: str, parameter: Parameter, held: Mapping[str, onnx.TensorProto]
) -> dict[str, int]:
    """The tensors that hold what the checkpoint calls so, each with the ONNX type that a graph reads it in."""
    if name not in checkpoint.matrices:
        return {name: BY_SAFETENSORS[checkpoint.tensors[name].dtype].onnx}
    matrix = checkpoint.matrices[name]
    if parameter.role:
        part = stacks.part(matrix, parameter.role, parameter.dtype, checkpoint.tensors)
        return {part.tensor.name: BY_NAME[part.dtype].onnx}
    whole, product, direct = (Multiplier(matrix, checkpoint.tensors, onnx.TensorProto.FLOAT) for _ in range(3))
    whole.whole(name)
    product.product(name, [])
    # The order of columns is undone in one of two ways, and MatMulNBits reads bytes.
    maker = product if product.reads <= {*held} else whole
    if direct.fits and matrix.values in held and held[matrix.values].data_type == onnx.TensorProto.UINT8:
        direct.multiply([])
        maker = direct
    return {t.name: t.data_type for t in maker.initializers if t.name in maker.reads}


def _differs(tensor: onnx.TensorProto | None, kind: int, stored: StoredTensor, checkpoint: Checkpoint) -> str | None:
    """How an initialiser is another tensor than the one in the checkpoint; None if it is that one."""
    if tensor is None:
        return "is not in the graph's file"
    if tensor.data_type != kind:
        return f"is of ONNX type {tensor.data_type} in the graph's file, {stored.dtype} in the checkpoint"
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return _compared("lies in the graph's file", _bytes(onnx.numpy_helper.to_array(tensor)), stored, checkpoint)
    said = {e.key: e.value for e in tensor.external_data}
    at = (said.get("location"), said.get("offset", "0"), said.get("length"))
    if at == (stored.file, str(stored.offset), str(stored.nbytes)):
        return None
    where = f"is read from {at[0]} at {at[1]}, not from {stored.file} at {stored.offset}"
    if at[0] not in {s.file for s in checkpoint.shards} or not at[1].isdecimal() or at[2] != str(stored.nbytes):
        return where
    path = checkpoint.folder / str(at[0])
    if int(at[1]) + stored.nbytes > path.stat().st_size:
        return where
    return _compared(where, np.memmap(path, np.uint8, "r", int(at[1]), stored.nbytes), stored, checkpoint)


def _compared(where: str, found: np.ndarray, stored: StoredTensor, checkpoint: Checkpoint) -> str | None:
    """Numbers that lie elsewhere may be the same."""
    expected = _bytes(checkpoint.read(stored.name))
    if found.size != expected.size:
        return f"{where}, in {found.size} bytes of {expected.size}"
    other = np.flatnonzero(found != expected)
    return f"{where}, where other numbers lie" if other.size else None


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
