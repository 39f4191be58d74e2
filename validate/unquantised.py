"""How far quantisation itself moved the logits: the same tokens through the checkpoint that was quantised."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from llmexport.export import archs
from llmexport.export.checkpoint import Checkpoint, open_checkpoint
from llmexport.export.errors import ExportError
from llmexport.export.exported import Export, ExportedGraph
from llmexport.export.identity import identify
from llmexport.export.keys import QUANTISATION
from llmexport.export.onnx_file import Request, open_model, read_model
from llmexport.export.packed.experts import with_experts
from llmexport.export.spec import Experts, Graph, Model
from llmexport.export.wanted import tensor_names, wanted_graphs
from llmexport.validate.drive import Run, follow, in_torch
from llmexport.validate.judge import compare_runs
from llmexport.validate.metrics import Metrics
from llmexport.validate.stages import Script
from llmexport.validate.tolerance import tolerances

TITLE = "moved by quantisation"


def unquantised(export: Export, folder: Path) -> Export:
    """The model of the checkpoint in `folder`, of the same graphs as the export, its weights where they lie.

    It has no files of graphs: PyTorch computes it. Raises ExportError if that is of another model, lacks a weight, or
    is what was exported.
    """
    checkpoint, own = open_checkpoint(folder), export.checkpoint()
    if export.block is not None or not own.matrices:
        raise ExportError(f"--reference: {export.folder} is no whole model of quantised weights: leave it out")
    held = {s.header_sha256 for s in own.shards}
    if checkpoint.matrices and all(s.header_sha256 in held for s in checkpoint.shards):
        raise ExportError(
            f"--reference: {folder} is quantised as the export is: give the checkpoint that it was made of"
        )
    said, config = ({k: v for k, v in c.items() if k not in QUANTISATION} for c in (export.config, checkpoint.config))
    models = [read_model(archs.choose(None, c), c, part="all") for c in (said, config)]
    if _meant(models[0]) != _meant(models[1]):
        raise ExportError(f"--reference: config.json of {folder} is of another model than {export.folder}")
    try:
        request, model, _ = open_model(_request(export, checkpoint))
        graphs, wanted, _ = wanted_graphs(request.arch, request.checkpoint, model, None)
    except ExportError as error:
        raise ExportError(f"--reference: {folder}: {error}; give the checkpoint that was quantised") from error
    files = tuple(identify(folder / s.file, s, "link", whole=False)[0] for s in checkpoint.shards)
    read = tuple(
        ExportedGraph(g.name, g.assembly, g.carried, tensor_names(wanted[g.name]), {}, {}, sha256="") for g in graphs
    )
    return dataclasses.replace(export, folder=folder, config=checkpoint.config, graphs=read, weights=files, held={})


def _meant(model: Model) -> list[Graph]:
    """Its graphs, without how experts lie: tools that quantise turn them."""

    def ours(block: Experts, path: str) -> Experts:
        return dataclasses.replace(block, transposed=False)

    return [dataclasses.replace(g, assembly=with_experts(g.assembly, ours)) for g in model.graphs]


def _request(export: Export, checkpoint: Checkpoint) -> Request:
    """What was asked for of the export, of this checkpoint."""
    names = {g.name for g in export.graphs}
    part = "vision" if names == {"vision"} else "all" if "vision" in names else "text"
    return Request(
        archs.choose(None, checkpoint.config),
        checkpoint,
        export.dtype,
        cache="static" if export.max_tokens else "dynamic",
        max_tokens=export.max_tokens,
        window_slots=export.window_slots,
        logits="last" if export.gives_last_logits else "all",
        part=part,
    )


def moved(export: Export, reference: Export, script: Script, ours: Run) -> Metrics | None:
    """What the tokens of the script tell, the logits of `reference` against `ours`, both by our PyTorch."""
    with in_torch(reference) as model:
        run = follow(model, reference, script)
    return compare_runs(TITLE, script, run, ours, tolerances(export.dtype, export)).metrics
