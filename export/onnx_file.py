"""From a checkpoint to a folder with `model.onnx`: trace, stitch, fuse, bind, write."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx

from llmexport.export import cache, manifest, weights
from llmexport.export.archs import Named, text_config
from llmexport.export.assembly import (
    Assembly,
    Step,
    alone,
    assemble,
    checkpoint_name,
    find_block,
    named_blocks,
    part_names,
    tied_names,
)
from llmexport.export.checkpoint import Checkpoint
from llmexport.export.config import Config
from llmexport.export.errors import ExportError
from llmexport.export.identity import changed, identify
from llmexport.export.manifest import MODEL, Manifest
from llmexport.export.output import new_folder
from llmexport.export.placing import check_config, place_companions, place_weights
from llmexport.export.spec import OPSET, Block, Model, Port, to_data
from llmexport.graphs import bodies, pipeline
from llmexport.graphs.cut import cut
from llmexport.graphs.stitch import Piece, stitch
from llmexport.plugins.spec import Attribute

BLOCKS = "blocks.json"
ELEMENT_TYPES = {
    "float32": onnx.TensorProto.FLOAT,
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
    "int32": onnx.TensorProto.INT32,
    "int64": onnx.TensorProto.INT64,
    "bool": onnx.TensorProto.BOOL,
}
# Told of each step of a long job: what is done, how many of how many.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Request:
    """What to export: `block` is None for the whole model; `weights` is auto, link or copy; `digest` reads every byte.

    `target` is "portable", with a function body for every op of ours, or "tensorrt": without, as its parser takes
    a body over a plugin of the same name.
    """

    arch: Named
    checkpoint: Checkpoint
    dtype: str = "float32"
    block: str | None = None
    weights: str = "auto"
    target: str = "portable"
    digest: bool = False


def read_model(arch: Named, config: Mapping[str, Any]) -> Model:
    """The model that a config describes. Raises ExportError on what this architecture does not understand."""
    keys = Config(text_config(arch.arch, config))
    model = arch.arch.build(keys)
    keys.finish()
    return model


def write(request: Request, target: Path, *, force: bool, progress: Progress) -> dict[str, Any]:
    """Exports the whole model or one block to the folder `target`, which appears whole or not at all.

    Returns its manifest.
    """
    with new_export(request, target, force=force) as folder:
        return fill(request, folder, progress)


def write_blocks(request: Request, target: Path, *, force: bool, progress: Progress) -> dict[str, Any]:
    """Exports every block alone, each to a folder of its name in `target`; returns the manifests by name."""
    names = named_blocks(read_model(request.arch, request.checkpoint.config))
    with new_export(request, target, force=force, marker=BLOCKS) as folder:
        records = {}
        for name in names:
            (folder / name).mkdir()
            records[name] = fill(dataclasses.replace(request, block=name), folder / name, progress)
        (folder / BLOCKS).write_text(json.dumps({"blocks": list(names)}))
    return records


@contextmanager
def new_export(request: Request, target: Path, *, force: bool, marker: str = manifest.NAME) -> Iterator[Path]:
    """As `output.new_folder`; but --force must not delete the checkpoint with the output that holds it."""
    if request.checkpoint.folder.resolve().is_relative_to(target.resolve()):
        raise ExportError(f"the checkpoint lies in {target}, which the export would replace: choose another output")
    with new_folder(target, force=force, marker=marker) as folder:
        yield folder


def fill(request: Request, folder: Path, progress: Progress) -> dict[str, Any]:
    """Exports into an empty folder; returns the manifest."""
    model = read_model(request.arch, request.checkpoint.config)
    assembly = assemble(model) if request.block is None else alone(find_block(model, request.block))
    built = build(request, model, assembly, progress)
    used = {request.checkpoint.tensors[n].file for p in built.wanted.values() for n in p.sources}
    shards = [s for s in request.checkpoint.shards if s.file in used]
    progress(f"weights ({len(shards)} files)", 0, 1)
    placed = place_weights({request.checkpoint.folder / s.file: s.stamp for s in shards}, folder, request.weights)
    files = [identify(folder / s.file, s, placed[s.file], whole=request.digest) for s in shards]
    check_config(request.checkpoint)
    # A block is no model that a tokenizer belongs to.
    companions = place_companions(request.checkpoint, folder) if request.block is None else {}
    progress("weights", 1, 1)
    record = manifest.record(request, assembly, built, files)
    data = built.proto.SerializeToString(deterministic=True)
    record = manifest.finish(folder, record, companions, data)
    (folder / MODEL).write_bytes(data)
    (folder / manifest.NAME).write_bytes(manifest.encode(record))
    return record


@dataclass(frozen=True)
class Built:
    """The finished graph; what the passes did; how often each custom op occurs; the weights it wants, by their
    name in the checkpoint; and the weights of each step, by the path in its block, with the names of all its parts
    where the checkpoint has it in parts."""

    proto: onnx.ModelProto
    fusions: dict[str, dict[str, Any]]
    ops: dict[str, int]
    wanted: dict[str, weights.Parameter]
    step_weights: dict[str, dict[str, str | list[str]]]


def build(request: Request, model: Model, assembly: Assembly, progress: Progress) -> Built:
    """The graph of an assembly, its weights bound to the checkpoint's tensors where they lie."""
    arch, dtype = request.arch.arch, request.dtype
    graphs = trace_all(assembly.blocks, dtype, progress)
    values: dict[str, dict[str, str]] = {}
    wanted: dict[str, weights.Parameter] = {}
    step_weights: dict[str, dict[str, str | list[str]]] = {}
    for step in assembly.steps:
        own = values[step.name] = {p.name: n for p, n in zip(step.block.inputs, step.inputs, strict=True)}
        step_weights[step.name] = {}
        for value in graphs[step.block].graph.input:
            if value.name not in own:
                parameter = _parameter(request, model, step, value)
                own[value.name] = parameter.name
                wanted[parameter.name] = parameter
                step_weights[step.name][value.name] = list(parameter.parts) or parameter.name
        own |= {p.name: n for p, n in zip(step.block.outputs, step.outputs, strict=True)}
    ignore = arch.ignore
    if model.tied:
        head, table = tied_names(arch)
        ignore += (head,) if weights.check_tied(head, table, request.checkpoint) else ()
    weights.check(wanted, request.checkpoint, ignore, whole=request.block is None)
    stored = {n: weights.stored_type(p, request.checkpoint) for n, p in wanted.items() if p.as_stored}

    def make() -> bytes:
        pieces = [Piece(s.name, graphs[s.block], values[s.name]) for s in assembly.steps]
        return join(pieces, assembly, dtype, request.target, stored).SerializeToString()

    key = [to_data(assembly), values, dtype, request.target, stored, [p.__name__ for p in pipeline.PIPELINE]]
    proto = onnx.ModelProto.FromString(cache.cached("graph", key, make))
    fusions = {p.key: json.loads(p.value) for p in proto.metadata_props}
    del proto.metadata_props[:]
    weights.bind(proto, wanted, request.checkpoint, ELEMENT_TYPES[dtype])
    return Built(proto, fusions, bodies.count(proto), wanted, step_weights)


def _parameter(request: Request, model: Model, step: Step, value: onnx.ValueInfoProto) -> weights.Parameter:
    """The parameter behind an input of a step's graph: what the checkpoint calls it, whole or in parts."""
    arch, stored = request.arch.arch, request.checkpoint.tensors
    name = checkpoint_name(arch, model, step.path + value.name)
    kind = value.type.tensor_type
    shape = tuple(d.dim_value for d in kind.shape.dim)
    parts = () if name in stored else part_names(arch, step.path + value.name, shape[0] if shape else 0)
    return weights.Parameter(
        name, shape, parts, value.name in step.block.as_stored, packed=kind.elem_type == onnx.TensorProto.UINT8
    )


def join(
    pieces: list[Piece], assembly: Assembly, dtype: str, target: str, stored: Mapping[str, int] = MappingProxyType({})
) -> onnx.ModelProto:
    """The pieces stitched and fused, weights still graph inputs, those in `stored` of that ONNX type; what each pass
    did is in `metadata_props`."""
    inputs, outputs = ([value_info(p, dtype) for p in ports] for ports in (assembly.inputs, assembly.outputs))
    stitched = stitch(pieces, inputs, outputs, opset=OPSET)
    for value in stitched.graph.input:
        if value.name in stored:
            value.type.tensor_type.elem_type = stored[value.name]
    proto, fusions = pipeline.run(stitched)
    if target == "portable":
        bodies.attach_bodies(proto, load_body)
    for name, fused in fusions.items():
        proto.metadata_props.add(key=name, value=json.dumps({"count": fused.count, "refused": fused.refused}))
    return proto


def load(found: Manifest) -> onnx.ModelProto:
    """The model of an export without its weights, and with the bodies of its ops, whatever its target.

    Raises ExportError if it is missing or another than was exported.
    """
    path = found.folder / MODEL
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ExportError(f"{path} is missing from the export: export again") from error
    if hashlib.sha256(data).hexdigest() != found.data["model_sha256"]:
        raise changed(path)
    proto = onnx.ModelProto.FromString(data)
    if found.data["target"] == "tensorrt":
        bodies.attach_bodies(proto, load_body)
    return proto


def trace_all(blocks: tuple[Block, ...], dtype: str, progress: Progress) -> dict[Block, onnx.ModelProto]:
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
    name: str, attributes: dict[str, Attribute], types: list[str], shapes: list[list[int | str]]
) -> onnx.FunctionProto:
    def make() -> bytes:
        from llmexport.export.trace import trace_body

        return trace_body(name, attributes, types, shapes).SerializeToString()

    sizes = [[d if isinstance(d, int) else None for d in shape] for shape in shapes]
    return onnx.FunctionProto.FromString(cache.cached("body", [name, attributes, types, sizes], make))


def value_info(port: Port, dtype: str) -> onnx.ValueInfoProto:
    element = ELEMENT_TYPES[dtype if port.dtype == "T" else port.dtype]
    return onnx.helper.make_tensor_value_info(port.name, element, list(port.shape))


def cut_step(model: onnx.ModelProto, step: Step, dtype: str) -> onnx.ModelProto:
    """The part of an exported model that computes one step; weights stay where they are."""
    inputs = [value_info(Port(n, p.shape, p.dtype), dtype) for n, p in zip(step.inputs, step.block.inputs, strict=True)]
    return cut(model, inputs, step.outputs)
