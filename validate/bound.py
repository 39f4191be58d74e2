"""What weights the file of a graph is bound to, held against those that the manifest says."""

from __future__ import annotations

import numpy as np
import onnx

from llmexport.export.checkpoint import Checkpoint, StoredTensor
from llmexport.export.exported import Export, ExportedGraph
from llmexport.export.wanted import load_parameters
from llmexport.export.weights import Parameter
from llmexport.plugins.dtypes import BY_ONNX, BY_SAFETENSORS


def parameters(graph: ExportedGraph, model: onnx.ModelProto) -> dict[str, dict[str, Parameter]]:
    """The weights of every step, by the path in its block; one of several tensors is called as in `model`."""
    rows = {n: node.output[0] for node in model.graph.node if node.op_type == "Concat" for n in node.input}
    stacks = {node.input[0]: node.output[0] for node in model.graph.node if node.op_type == "Reshape"}
    found: dict[str, dict[str, Parameter]] = {}
    for step in graph.assembly.steps:
        stored = load_parameters(step.block)
        own = found[step.name] = {}
        for path, names in graph.step_weights[step.name].items():
            parts = () if isinstance(names, str) else tuple(names)
            # No node has the name of a weight that the file does not put together.
            name = next((stacks[rows[p]] for p in parts if rows.get(p) in stacks), f"{step.path}{path}")
            own[path] = Parameter(
                name if parts else str(names), *(stored[path].shape, parts), stored[path].dtype, stored[path].group
            )
    return found


def wrong(export: Export, graph: ExportedGraph, model: onnx.ModelProto) -> dict[str, list[str]]:
    """By step, a sentence on each of its tensors that the file does not have as the checkpoint has it."""
    checkpoint = export.checkpoint()
    held = {t.name: t for t in model.graph.initializer}
    said: dict[str, str | None] = {}

    def differs(name: str) -> str | None:
        if name not in said:
            said[name] = _differs(held.get(name), checkpoint.tensors[name], checkpoint)
        return said[name]

    found = {}
    for step in graph.assembly.steps:
        names = [n for given in graph.step_weights[step.name].values() for n in _each(given)]
        if lines := [f"{name} {line}" for name in names if (line := differs(name))]:
            found[step.name] = lines
    return found


def _each(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _differs(tensor: onnx.TensorProto | None, stored: StoredTensor, checkpoint: Checkpoint) -> str | None:
    """How an initialiser is another tensor than the one in the checkpoint; None if it is that one."""
    if tensor is None:
        return "is not in the graph's file"
    if BY_ONNX.get(tensor.data_type) != BY_SAFETENSORS[stored.dtype]:
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
