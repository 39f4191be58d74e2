"""A graph and its file: trace its blocks, stitch, fuse, bind the weights; and read it back."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import onnx

from llmexport.export import cache, weights
from llmexport.export.checkpoint import Checkpoint
from llmexport.export.errors import ExportError
from llmexport.export.exported import Export, ExportedGraph
from llmexport.export.identity import changed
from llmexport.export.packed import fp4
from llmexport.export.progress import Progress, silent
from llmexport.export.spec import Assembly, Block, Graph, Port, Step, to_data
from llmexport.export.static import FUSED
from llmexport.export.wanted import tensor_names
from llmexport.graphs import bodies, pipeline
from llmexport.graphs.cut import cut
from llmexport.graphs.fusion import Fused
from llmexport.graphs.stitch import Piece, stitch
from llmexport.plugins.dtypes import BY_NAME
from llmexport.plugins.regular import read_regular
from llmexport.plugins.spec import Attribute

MOST_MODEL = 2**31 - 1  # bytes, protobuf's own limit


def build(
    graph: Graph,
    own: Mapping[str, Mapping[str, weights.Parameter]],
    checkpoint: Checkpoint,
    dtype: str,
    target: str,
    caching: str,
    progress: Progress = silent,
) -> tuple[ExportedGraph, bytes]:
    """A graph with its weights bound to the checkpoint's tensors where they lie, and its file.

    own: the weights that each step wants, by the path in its block. target, caching: a Request's target and cache.
    """
    assembly, writes = graph.assembly, caching == FUSED
    graphs = trace_all(assembly.blocks, dtype, progress)
    values = {
        s.name: {**s.reads, **{path: parameter.name for path, parameter in own[s.name].items()}, **s.makes}
        for s in assembly.steps
    }
    wanted = {p.name: p for parameters in own.values() for p in parameters.values()}
    stored = _stored_types(wanted, checkpoint, dtype)

    def make() -> bytes:
        pieces = [Piece(s.name, graphs[s.block], values[s.name]) for s in assembly.steps]
        return join(pieces, assembly, dtype, target, stored, writes).SerializeToString()

    passed = [p.__name__ for p in pipeline.passes(target, True, writes)]
    key = [to_data(assembly), values, dtype, target, stored, passed]
    proto = onnx.ModelProto.FromString(cache.cached("graph", key, make))
    fusions = {p.key: Fused(**json.loads(p.value)) for p in proto.metadata_props}
    del proto.metadata_props[:]
    weights.bind(proto, wanted, checkpoint, BY_NAME[dtype].onnx, target)
    fp4.attach(proto)
    data = proto.SerializeToString(deterministic=True)
    digest = hashlib.sha256(data).hexdigest()
    counts = bodies.count(proto)
    return ExportedGraph(graph.name, assembly, graph.carried, tensor_names(own), counts, fusions, digest), data


def join(
    pieces: list[Piece],
    assembly: Assembly,
    dtype: str,
    target: str,
    stored: Mapping[str, int] = MappingProxyType({}),
    writes: bool = False,
) -> onnx.ModelProto:
    """The pieces stitched and fused, weights still graph inputs, those in `stored` of that ONNX type; what each pass
    did is in `metadata_props`."""
    proto, fusions = pipeline.run(
        _stitched(pieces, assembly.inputs, assembly.outputs, dtype, stored, assembly.opset), target, writes
    )
    if target != "tensorrt":
        bodies.attach_bodies(proto, functools.partial(load_body, target=target))
    else:
        bodies.leave_to_plugins(proto)
    for name, fused in fusions.items():
        proto.metadata_props.add(key=name, value=json.dumps(dataclasses.asdict(fused)))
    return proto


def _stitched(
    pieces: list[Piece],
    inputs: Sequence[Port],
    outputs: Sequence[Port],
    dtype: str,
    stored: Mapping[str, int],
    opset: int,
) -> onnx.ModelProto:
    """The pieces as they were traced."""
    proto = stitch(pieces, *([value_info(p, dtype) for p in ports] for ports in (inputs, outputs)), opset=opset)
    for value in proto.graph.input:
        if value.name in stored:
            value.type.tensor_type.elem_type = stored[value.name]
    return proto


def as_traced(
    step: Step, own: Mapping[str, weights.Parameter], checkpoint: Checkpoint, dtype: str, opset: int
) -> onnx.ModelProto:
    """One step as it is traced, before any pass, with its weights and with bodies: what its part of a file must
    compute, value by value of the same name.

    own: the weights of the step by the path in its block.
    """
    values = {**step.reads, **{path: parameter.name for path, parameter in own.items()}, **step.makes}
    wanted = {p.name: p for p in own.values()}
    piece = Piece(step.name, load_block(step.block, dtype), values)
    proto = _stitched([piece], *_ports(step), dtype, _stored_types(wanted, checkpoint, dtype), opset)
    bodies.attach_bodies(proto, load_body)
    weights.bind(proto, wanted, checkpoint, BY_NAME[dtype].onnx)
    fp4.attach(proto)
    return proto


def load(export: Export, graph: ExportedGraph) -> onnx.ModelProto:
    """A graph of an export without its weights, and with the bodies of its ops, whatever the export's target.

    Raises ExportError if its file is missing or another than was exported.
    """
    proto = onnx.ModelProto.FromString(_read(export, graph))
    if export.target == "tensorrt":
        bodies.attach_bodies(proto, load_body)
    return proto


def check_files(export: Export) -> None:
    """Raise ExportError if the file of a graph is missing or another than was exported."""
    for graph in export.graphs:
        _read(export, graph)


def _read(export: Export, graph: ExportedGraph) -> bytes:
    path = export.folder / graph.file
    try:
        data = read_regular(path, MOST_MODEL)
    except FileNotFoundError as error:
        raise ExportError(f"{path} is missing from the export: export again") from error
    except OSError as error:
        raise ExportError(f"cannot read {path}: {error.strerror}: export again") from error
    if hashlib.sha256(data).hexdigest() != graph.sha256:
        raise changed(path)
    return data


def trace_all(blocks: tuple[Block, ...], dtype: str, progress: Progress = silent) -> dict[Block, onnx.ModelProto]:
    """The graph of every distinct block, from the cache or traced now."""
    graphs = {}
    for i, block in enumerate(blocks):
        progress(f"trace {block.kind}", i, len(blocks))
        graphs[block] = load_block(block, dtype)
    progress("trace", len(blocks), len(blocks))
    return graphs


def load_block(block: Block, dtype: str) -> onnx.ModelProto:
    def make() -> bytes:
        from llmexport.export.trace import trace_block

        return trace_block(block, dtype).SerializeToString()

    return onnx.ModelProto.FromString(cache.cached("block", [to_data(block), dtype], make))


def load_body(
    name: str,
    attributes: dict[str, Attribute],
    types: list[str],
    shapes: list[list[int | str]],
    target: str = "portable",
) -> onnx.FunctionProto:
    def make() -> bytes:
        from llmexport.export.trace import trace_body

        return trace_body(name, attributes, types, shapes, target).SerializeToString()

    sizes = [[d if isinstance(d, int) else None for d in shape] for shape in shapes]
    return onnx.FunctionProto.FromString(cache.cached("body", [name, attributes, types, sizes, target], make))


def value_info(port: Port, dtype: str) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(port.name, BY_NAME[port.typed(dtype).dtype].onnx, list(port.shape))


def cut_step(model: onnx.ModelProto, step: Step, dtype: str) -> onnx.ModelProto:
    """The part of an exported model that computes one step; weights stay where they are."""
    return cut(model, [value_info(p, dtype) for p in _ports(step)[0]], step.outputs)


def _ports(step: Step) -> tuple[list[Port], list[Port]]:
    """What goes into a step and what comes out, by the names of the values."""
    sides = ((step.block.inputs, step.inputs), (step.block.outputs, step.outputs))
    inputs, outputs = (
        [dataclasses.replace(p, name=n) for p, n in zip(ports, names, strict=True)] for ports, names in sides
    )
    return inputs, outputs


def _stored_types(wanted: Mapping[str, weights.Parameter], checkpoint: Checkpoint, dtype: str) -> dict[str, int]:
    """The ONNX types of the weights that a graph takes as they are stored."""
    to = BY_NAME[dtype].onnx
    return {n: weights.stored_type(p, checkpoint, to) for n, p in wanted.items() if p.cast(0) is None}
