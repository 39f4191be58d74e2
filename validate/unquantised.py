"""How far quantisation itself moved the logits: the same tokens through the checkpoint that was quantised."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from llmexport.export import archs
from llmexport.export.assembly import tied_names
from llmexport.export.checkpoint import Checkpoint, open_checkpoint
from llmexport.export.errors import ExportError
from llmexport.export.exported import Export, ExportedGraph
from llmexport.export.identity import identify
from llmexport.export.keys import QUANTISATION
from llmexport.export.onnx_file import read_model
from llmexport.export.packed.experts import with_experts
from llmexport.export.spec import Experts, Packed, Plain
from llmexport.export.values import show_name
from llmexport.export.wanted import load_parameters
from llmexport.validate.drive import Run, follow, in_torch
from llmexport.validate.judge import compare_runs
from llmexport.validate.metrics import Metrics
from llmexport.validate.stages import Script
from llmexport.validate.tolerance import tolerances

TITLE = "moved by quantisation"


def unquantised(export: Export, folder: Path) -> Export:
    """The export with the weights of the checkpoint in `folder`, where they lie, and experts that read those.

    Raises ExportError if that is of another model, or lacks a weight.
    """
    checkpoint, own = open_checkpoint(folder), export.checkpoint()
    if export.block is not None or not own.matrices:
        raise ExportError(f"--reference: {export.folder} is no whole model of quantised weights: leave it out")
    said, config = ({k: v for k, v in c.items() if k not in QUANTISATION} for c in (export.config, checkpoint.config))
    models = [read_model(archs.choose(None, c), c, part="all") for c in (said, config)]
    if models[0].graphs != models[1].graphs:
        raise ExportError(f"--reference: config.json of {folder} is of another model than {export.folder}")
    if models[0].ties != models[1].ties:
        export = _tied(export, dict(tied_names(archs.choose(None, config), models[1])))
    steps = (w for g in export.graphs for weights in g.step_weights.values() for w in weights.values())
    for name in (n for names in steps for n in ((names,) if isinstance(names, str) else names)):
        if _shape(checkpoint, name) != _shape(own, name):
            raise ExportError(
                f"--reference: {folder} has no {show_name(name)} of {list(_shape(own, name) or ())}: "
                "give the checkpoint that was quantised"
            )
    files = tuple(identify(folder / s.file, s, "link", whole=False)[0] for s in checkpoint.shards)
    graphs = tuple(_plain(g, own) for g in export.graphs)
    return dataclasses.replace(export, folder=folder, config=checkpoint.config, graphs=graphs, weights=files, held={})


def moved(export: Export, reference: Export, script: Script, ours: Run) -> Metrics | None:
    """What the tokens of the script tell, the logits of `reference` against `ours`, both by our PyTorch."""
    with in_torch(reference) as model:
        run = follow(model, reference, script)
    return compare_runs(TITLE, script, run, ours, tolerances(export.dtype, export)).metrics


def _tied(export: Export, originals: Mapping[str, str]) -> Export:
    """The export whose head, which was rounded, is the table again that it was a copy of."""
    graphs = []
    for graph in export.graphs:
        steps = {
            step: {path: originals.get(name, name) if isinstance(name, str) else name for path, name in weights.items()}
            for step, weights in graph.step_weights.items()
        }
        graphs.append(dataclasses.replace(graph, step_weights=steps))
    return dataclasses.replace(export, graphs=tuple(graphs))


def _plain(graph: ExportedGraph, own: Checkpoint) -> ExportedGraph:
    """The graph whose experts are read in floats, as they lie in the place of the matrices of `own`."""
    names = {s.path + path: names for s in graph.assembly.steps for path, names in graph.step_weights[s.name].items()}

    def floats(block: Experts, path: str) -> Experts:
        if not isinstance(block.storage, Packed):
            return block
        first = own.matrices[names[path + next(iter(block.stored))][0]]
        return dataclasses.replace(block, storage=Plain(), transposed=first.layout == "stacked")

    assembly = with_experts(graph.assembly, floats)
    weights = {
        s.name: {p: n for p, n in graph.step_weights[s.name].items() if p in {*load_parameters(s.block)}}
        for s in assembly.steps
    }
    return dataclasses.replace(graph, assembly=assembly, step_weights=weights)


def _shape(checkpoint: Checkpoint, name: str) -> tuple[int, ...] | None:
    if matrix := checkpoint.matrices.get(name):
        return matrix.unquantised
    held = checkpoint.tensors.get(name)
    return None if held is None else tuple(held.shape)
