"""The rung `network`: what TensorRT reads of the exported files, computed on this CPU, with no kernel of TensorRT's."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata

from llmexport.export import graph_file
from llmexport.export.engine_backend import check_backend
from llmexport.export.evaluation import Evaluator, evaluator
from llmexport.export.exported import Export, ExportedGraph
from llmexport.export.tensorrt_form import tensorrt_form
from llmexport.plugins import library
from llmexport.plugins.errors import UserError
from llmexport.plugins.normed_route import NORMED_ROUTES
from llmexport.validate import nodes
from llmexport.validate.compare import compare
from llmexport.validate.cost import multiply_adds
from llmexport.validate.drive import Recorded
from llmexport.validate.feeds import Feed
from llmexport.validate.runners import metadata, not_runnable
from llmexport.validate.tolerance import STEP_STRAYS, tolerance

BACKEND = "tensorrt-rtx"  # the parser of TensorRT is of the same sources
# Multiply-adds of a prompt: some minutes on two cores, and more than one layer at published size with its vocabulary.
MOST = 5e11
LONGEST = 1800.0  # seconds of one call, after which its process hangs


class NetworkRunner(BaseRunner):  # type: ignore[misc]
    """A graph as TensorRT's parser reads it, its plugin layers by the references of their ops."""

    def __init__(self, export: Export, graph: ExportedGraph) -> None:
        super().__init__(name="TensorRT's network")
        self._export, self._graph = export, graph
        self._stack = contextlib.ExitStack()

    def activate_impl(self) -> None:
        self._evaluator = self._stack.enter_context(_evaluator(self._export, self._graph))

    def deactivate_impl(self) -> None:
        self._stack.close()

    def get_input_metadata_impl(self) -> TensorMetadata:
        return metadata(self._graph.assembly.inputs, self._export.dtype)

    def infer_impl(self, feed_dict: Feed) -> OrderedDict[str, np.ndarray]:
        start = time.perf_counter()
        made = self._evaluator.run(feed_dict)
        self.inference_time = time.perf_counter() - start
        return OrderedDict((p.name, made[p.name]) for p in self._graph.assembly.outputs)


@contextlib.contextmanager
def _evaluator(export: Export, graph: ExportedGraph) -> Iterator[Evaluator]:
    """With our ops as plugin layers where there is a plugin library, else from their bodies."""
    with (
        tempfile.TemporaryDirectory(prefix="llmexport-") as work,
        evaluator(export, graph, Path(work), backend=BACKEND, plugins=library.find(), timeout=LONGEST) as evaluated,
    ):
        yield evaluated


def unable(export: Export, asked: bool) -> str:
    """Why the network of this export is not computed here, or nothing; if it was asked for, size is no reason."""
    if export.target == "onnxruntime":
        return "it was exported for ONNX Runtime alone: export it without --target"
    try:
        check_backend(BACKEND)
        library.find()
    except UserError as error:
        return str(error)
    products = multiply_adds(export)
    if asked or products <= MOST:
        return ""
    return f"a prompt takes {products:.0e} multiply-adds, over {MOST:.0e}: --rungs network runs it anyway"


def form(export: Export) -> str:
    """In which form TensorRT is given the ops of this export, for people."""
    if not any(g.ops for g in export.graphs):
        return ""
    return "ops as plugin layers, by their references" if library.find() else "ops from their bodies"


def trace(export: Export, recorded: Recorded) -> str:
    """The first layer whose output leaves tolerance though it reads right numbers, for people."""
    bound = dataclasses.replace(tolerance(export.dtype, export), scaled=True, strays=0.0)
    for graph in export.graphs:
        with _evaluator(export, graph) as network:
            # What they choose by is their own, and not what is known: a roundoff sends a token to other experts.
            routing = {f"layer {n} (PLUGIN_V3)" for n, op in network.nodes.items() if op in NORMED_ROUTES}
            for stage, recorded_values in recorded.items():
                if graph.name not in recorded_values:
                    continue
                values = recorded_values[graph.name]
                feed = {p.name: values[p.name] for p in graph.assembly.inputs}
                known = _known(export, graph, feed, values)
                made, layers = network.apart(feed, known)
                for name, found in made.items():
                    # What both take to be no number is the same.
                    lost = ~(np.isfinite(known[name].astype(float)) | np.isfinite(found.astype(float)))
                    strays = STEP_STRAYS if layers[name] in routing and export.dtype != "float32" else 0.0
                    difference = compare(np.where(lost, 0, known[name]), np.where(lost, 0, found), strays=strays)
                    if difference.excess(bound) > 1:
                        off = f"{difference.rms_ratio:.1e} of its rms off"
                        return f"first in {stage}: {layers[name]}, whose {name} is {off}"
    return "no layer leaves tolerance by itself"


def _known(export: Export, graph: ExportedGraph, feed: Feed, ours: Feed) -> Feed:
    """All that ONNX Runtime makes outside loops and branches, by the names that TensorRT keeps; or, where it cannot run
    the model, what our PyTorch makes from block to block."""
    if not_runnable(export.dtype):
        return {n: a for n, a in ours.items() if n not in feed}
    model = graph_file.load(export, graph)
    if not library.find():
        model, _ = tensorrt_form(model)
    return nodes.values(model, feed, export.folder)
