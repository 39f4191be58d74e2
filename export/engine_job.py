"""What a builder's process is given of a graph, whether it builds an engine or computes what TensorRT reads."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from llmexport.export import beside
from llmexport.export.binding import Binding
from llmexport.export.engine_build import JOB, MODEL
from llmexport.export.errors import EngineError
from llmexport.export.exported import Export, ExportedGraph
from llmexport.export.graph_file import load
from llmexport.export.join_norm import join_norms
from llmexport.export.join_products import join_products
from llmexport.export.join_route import join_routes
from llmexport.export.join_shared import join_shared
from llmexport.export.packed.engine_form import engine_form
from llmexport.export.tensorrt_form import tensorrt_form
from llmexport.graphs.launches import kernels_of
from llmexport.plugins.declared import declared
from llmexport.plugins.normed import ADDENDS, EXPERTS
from llmexport.plugins.normed_route import NORMED_ROUTES
from llmexport.plugins.shared_route import ROUTE, SHARED_ROUTES

# The op that has a plugin's kernels.
OF_PLUGINS = {**dict.fromkeys(ADDENDS, EXPERTS), **dict.fromkeys((*SHARED_ROUTES, *NORMED_ROUTES), ROUTE)}


@dataclass(frozen=True)
class Job:
    """A graph in TensorRT's form: `nodes` are left to plugins, name -> op, or a plugin of plugins/normed.py,
    shared_route.py or normed_route.py; `bindings` make the weights that are inputs.

    said: what the job's file says, to which the builder's task is added.
    """

    model: onnx.ModelProto
    nodes: dict[str, str]
    bindings: Mapping[str, Binding]
    said: Mapping[str, Any]

    @property
    def launches(self) -> dict[str, int]:
        """Of each node that is left to a plugin, how many kernels it is at one token a row."""
        plugins = {n: OF_PLUGINS.get(op, op) for n, op in self.nodes.items()}
        return {n.name: kernels_of(n, plugins[n.name]) for n in self.model.graph.node if n.name in plugins}

    def write(self, folder: Path, **more: Any) -> None:
        """Leaves it in an empty folder."""
        (folder / MODEL).write_bytes(self.model.SerializeToString())
        (folder / JOB).write_text(json.dumps({**self.said, **more}))


def prepare(
    export: Export, graph: ExportedGraph, module: str, plugins: Path | None, served: frozenset[str], weights: str
) -> Job:
    """module: TensorRT's. plugins, weights: as of `engine.build`; `served` are the ops that the library has.

    Raises EngineError on what TensorRT would misread or was not meant to read, and on weights that cannot lie beside a
    plan.
    """
    if export.target == "onnxruntime":
        raise EngineError(f"{export.folder} was exported for ONNX Runtime alone: export it without --target")
    loaded = load(export, graph)
    given = engine_form(loaded)
    model, nodes = tensorrt_form(loaded, served)
    folder = (export.folder / graph.file).parent
    if weights == "inside":
        nodes = join_shared(model, nodes, served)
    nodes = join_routes(model, nodes, served, folder)
    if weights == "inside":
        given = join_products(model, served, given, folder)
    nodes = join_norms(model, nodes, served)
    bindings = beside.beside(model, beside.LARGE) if weights == "beside" else {}
    said = {
        "module": module,
        "model": os.path.realpath(export.folder / graph.file),
        "weights": list(bindings),
        "large": beside.LARGE,
        "given": [dataclasses.asdict(g) for g in given],
    }
    aliasing = {op.name for op in declared() if op.aliases}
    ours = {"library": str(plugins), "aliased": not aliasing.isdisjoint(nodes.values())} if nodes else {}
    return Job(model, nodes, bindings, said | ours)
