"""From a request to an export: a folder with one `.onnx` for each graph, the weights and the manifest."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmexport.export import cache, manifest, quantize
from llmexport.export.apart import with_experts_apart
from llmexport.export.archs import as_stored, in_layout, multimodal_names
from llmexport.export.assembly import named_blocks
from llmexport.export.checkpoint import Checkpoint
from llmexport.export.coded import in_floats
from llmexport.export.config import Config
from llmexport.export.earlier import BLOCKS
from llmexport.export.errors import ExportError
from llmexport.export.exported import Export
from llmexport.export.graph_file import build
from llmexport.export.handover import RUNTIMES, hand_over
from llmexport.export.last_logits import with_last_logits
from llmexport.export.multimodal import PARTS, left_out, read_tower, text_config, tower_tensors, with_part
from llmexport.export.output import new_folder
from llmexport.export.packed import notes as packed_notes
from llmexport.export.packed.experts import with_packed
from llmexport.export.packed.repack import with_repacked
from llmexport.export.placing import check_config, check_room, place_companions, place_shards
from llmexport.export.progress import Progress, silent
from llmexport.export.small_experts import with_small_experts
from llmexport.export.spec import DTYPES, Arch, Model
from llmexport.export.stamp import stamp
from llmexport.export.static import FUSED, StaticCache, check_fused, check_slots, windows_of
from llmexport.export.wanted import check_layers, check_weights, wanted_graphs, whole

WEIGHTS = ("auto", "link", "copy")
TARGETS = ("portable", "tensorrt", "onnxruntime")
CACHES = ("dynamic", "static", FUSED)
LOGITS = ("all", "last")
WINDOW_SLOTS = ("auto", "last", "all")


@dataclass(frozen=True)
class Request:
    """What to export: `block` is None for the whole model; `weights` is auto, link or copy; `digest` reads every byte.

    `target` is "portable", with a function body for every op of ours; "tensorrt": without, as its parser takes a body
    over a plugin of that name; or "onnxruntime": as that is faster, unread by TensorRT. `max_tokens` are the slots of a
    static `cache`; `window_slots`: which of them a layer with a window keeps, the last or all; auto: the last, but all
    of few windows for ONNX Runtime. `runtimes` are others that shall open the folder. `logits` are of all tokens, or of
    the last of each row. `part` of a multimodal checkpoint is all of it, its text model or what sees. `quantize` rounds
    the matrices of products, with `quantize_head` the head's too, to int4 in groups of `group_size` columns (128), int8
    or fp8.
    """

    arch: Arch
    checkpoint: Checkpoint
    dtype: str = "float32"
    block: str | None = None
    weights: str = "auto"
    target: str = "portable"
    digest: bool = False
    cache: str = "dynamic"
    max_tokens: int | None = None
    runtimes: tuple[str, ...] = ()
    logits: str = "all"
    part: str = "all"
    quantize: str | None = None
    group_size: int | None = None
    quantize_head: bool = False
    window_slots: str = "auto"

    def __post_init__(self) -> None:
        said = (("dtype", DTYPES), ("weights", WEIGHTS), ("target", TARGETS), ("window_slots", WINDOW_SLOTS))
        for name, choices in (*said, ("cache", CACHES), ("logits", LOGITS), ("part", PARTS)):
            if (value := getattr(self, name)) not in choices:
                raise ExportError(f"{name} is {value!r}: choose one of {', '.join(choices)}")
        check_slots(self.cache, self.max_tokens, self.target, self.window_slots)
        if unknown := [r for r in self.runtimes if r not in RUNTIMES]:
            raise ExportError(f"runtime is {unknown[0]!r}: choose of {', '.join(RUNTIMES)}")
        odd = f"block {self.block!r}" if self.block else f"target {self.target}" if self.target == "tensorrt" else ""
        if self.runtimes and odd:
            wants = f"{' and '.join('--for ' + r for r in self.runtimes)} takes a whole model that ONNX Runtime runs"
            raise ExportError(f"{wants}, not {odd}: leave one of them out")
        if self.part == "vision" and (self.cache != "dynamic" or self.logits != "all"):
            raise ExportError("--part vision keeps no cache and gives no logits: leave --cache and --logits out")
        others = (self.block, self.weights, self.part)
        quantize.check(self.quantize, self.group_size, self.quantize_head, self.checkpoint, *others)


def read_model(arch: Arch, config: Mapping[str, Any], static: StaticCache | None = None, part: str = "text") -> Model:
    """The model that a config describes, or this part of it, with a static cache if one is said.

    Raises ExportError on what this architecture does not understand.
    """
    return read_noted(arch, config, static, part)[0]


def read_noted(
    arch: Arch, config: Mapping[str, Any], static: StaticCache | None = None, part: str = "text"
) -> tuple[Model, list[str]]:
    """The same, with sentences on what the config says and the graph leaves out."""
    vision, splice = read_tower(arch, config, part) or (None, None)
    keys = Config(text_config(arch, config), static, splice)
    model = arch.build(keys)
    keys.finish(causal=any(g.carried for g in model.graphs))
    if vision and part == "vision":
        return Model((vision,), {}), []
    notes = [*keys.notes, *filter(None, [left_out(arch, config)])]
    return (Model((vision, *model.graphs), model.ties) if vision else model), notes


def open_model(request: Request) -> tuple[Request, Model, list[str]]:
    """The model of a request, which then has the names of its checkpoint, and notes for who exports.

    What is made here is bounded by what the checkpoint holds: a config alone can ask for anything.
    """
    if request.quantize and request.checkpoint.matrices:
        request = dataclasses.replace(request, checkpoint=in_floats(request.checkpoint))
    config, part = request.checkpoint.config, request.part
    windows = windows_of(request.window_slots, request.target)
    static = StaticCache(request.max_tokens, windows) if request.max_tokens else None
    model, notes = read_noted(request.arch, config, static, part)
    model = with_last_logits(model) if request.logits == "last" else model
    stored = request.checkpoint.names
    named = with_part(in_layout(request.arch, config, stored), config, part, stored)
    arch = as_stored(named, stored)
    check_layers(arch, model, stored, tower_tensors(arch, config, part))
    if arch is not named and model.ties:
        notes.append(
            f"the checkpoint is a base model, its names lack {arch.base!r}: "
            "the logits are made with its tied embedding table"
        )
    if request.dtype == "float16" and arch.overflows_float16 and part != "vision":
        notes.append(f"{arch.overflows_float16}, use bfloat16 or float32")
    if request.quantize and (apart := with_experts_apart(arch, model, request.checkpoint)) is not request.checkpoint:
        return open_model(dataclasses.replace(request, checkpoint=apart))
    packed = with_packed(model, arch, request.checkpoint, request.target, request.dtype)
    if request.quantize_head and model.ties:
        copied = quantize.untied(arch, model, request.checkpoint)
        request, own, notes = open_model(dataclasses.replace(request, checkpoint=copied, quantize_head=False))
        quantize.check_untied(arch, packed, own)
        return dataclasses.replace(request, quantize_head=True), own, notes
    return dataclasses.replace(request, arch=arch), packed, notes


def write(request: Request, target: Path, *, force: bool = False, progress: Progress = silent) -> Export:
    """Exports the whole model or one block to the folder `target`, which appears whole or not at all."""
    with new_export(request, target, force=force) as folder:
        export = fill(request, folder, progress)
        check_fused(request.cache, {op for graph in export.graphs for op in graph.ops})
    return dataclasses.replace(export, folder=target)


def write_blocks(
    request: Request, target: Path, *, force: bool = False, progress: Progress = silent
) -> dict[str, Export]:
    """Exports every block alone, each to a folder of its name in `target`; returns them by name."""
    kind = (request.quantize, request.group_size, request.quantize_head, request.checkpoint)
    quantize.check(*kind, "all", request.weights, request.part)
    names = named_blocks(open_model(request)[1])
    with new_export(request, target, force=force, marker=BLOCKS) as folder:
        exports = {}
        for name in names:
            (folder / name).mkdir()
            export = fill(dataclasses.replace(request, block=name), folder / name, progress)
            exports[name] = dataclasses.replace(export, folder=target / name)
        (folder / BLOCKS).write_text(json.dumps({"made_by": "llmexport", "blocks": list(names)}))
    return exports


@contextmanager
def new_export(request: Request, target: Path, *, force: bool, marker: str = manifest.NAME) -> Iterator[Path]:
    """As `output.new_folder`; but --force must not delete the checkpoint with the output that holds it."""
    if Path(os.path.realpath(request.checkpoint.folder)).is_relative_to(os.path.realpath(target)):
        raise ExportError(f"the checkpoint lies in {target}, which the export would replace: choose another output")
    with cache.unswept(), new_folder(target, force=force, marker=marker) as folder:
        yield folder


def fill(request: Request, folder: Path, progress: Progress = silent) -> Export:
    """Exports into an empty folder."""
    stored = request.checkpoint
    request, model, notes = open_model(request)
    arch, checkpoint = request.arch, request.checkpoint
    graphs, own, wanted = wanted_graphs(arch, checkpoint, model, request.block)
    # A trace takes seconds: what does not fit is told before.
    check_weights(arch, checkpoint, model, wanted, request.part, whole=request.block is None)
    if request.target == "tensorrt" and (request.quantize or checkpoint.matrices):
        raise ExportError(
            "target tensorrt: weights in few bits get TensorRT's form when their engine is built: export without "
            "--target, then run `llmexport engine`"
        )
    kind = (request.group_size, request.quantize_head, arch, checkpoint, graphs, own, folder)
    made = quantize.quantise(request.quantize, *kind) if request.quantize else None
    if made:
        checkpoint, notes = made.checkpoint, [*notes, *made.told.notes]
        graphs = with_packed(model, arch, checkpoint, request.target, request.dtype).graphs
    model = dataclasses.replace(model, graphs=graphs)
    laid_out = with_small_experts(model, arch, checkpoint, request.target, request.dtype)
    if made or laid_out is not model:
        graphs, own, wanted = wanted_graphs(arch, checkpoint, laid_out, None)
    checkpoint, repacked = with_repacked(checkpoint, wanted, join=request.target == "onnxruntime")
    own = {graph: {step: whole(p, checkpoint) for step, p in steps.items()} for graph, steps in own.items()}
    config = text_config(arch, checkpoint.config)
    handed = hand_over(request.runtimes, graphs, config, checkpoint.folder, arch.rope_keys)
    used = {checkpoint.tensors[n].file for p in wanted for s in p.sources for n in checkpoint.holders(s)}
    check_room(checkpoint, () if made else used, folder, request.weights, repacked.nbytes if repacked else 0)
    built = [build(g, own[g.name], checkpoint, request.dtype, request.target, request.cache, progress) for g in graphs]
    progress("weights", 0, 1)
    if made:
        found = made.write(folder, request.digest, progress)
    else:
        found = place_shards(checkpoint, used, folder, request.weights, whole=request.digest)
    check_config(stored)
    # A block is no model that a tokenizer belongs to.
    companions = place_companions(checkpoint, folder, rounded=bool(made)) if request.block is None else {}
    for told in (made.told, handed) if made else (handed,):
        companions |= told.place(folder)
    if repacked:
        held = made.written(folder) if made else checkpoint
        found.append(repacked.write(folder, held.read, whole=request.digest))
    progress("weights", 1, 1)
    for graph, data in built:
        (folder / graph.file).write_bytes(data)
    export = Export(
        folder=folder,
        arch=arch.name,
        block=request.block,
        dtype=request.dtype,
        target=request.target,
        opset=max(graph.assembly.opset for graph, _ in built),
        graphs=tuple(graph for graph, _ in built),
        weights=tuple(file for file, _ in found),
        config=checkpoint.config,
        text_config=config,
        renamed=multimodal_names(arch, checkpoint.config, checkpoint.names),
        reference=arch.reference,
        versions=cache.versions(),
        notes=(*notes, *(packed_notes.widened if made else packed_notes.notes)(wanted, checkpoint), *handed.notes),
        companions=dict(sorted(companions.items())),
        inode=stamp(folder).inode,
        held={file.file: held for file, held in found},
    )
    (folder / manifest.NAME).write_bytes(manifest.encode(manifest.as_data(export)))
    return export
