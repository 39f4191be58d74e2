"""The engines of an export as a form of it: what the ladder runs beside ONNX Runtime."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import OrderedDict
from collections.abc import Mapping

import numpy as np
from polygraphy.backend.base import BaseRunner

from llmexport.export import engine_record
from llmexport.export.exported import Export, ExportedGraph
from llmexport.export.spec import FEATURES, IMAGES, TILES, size_of, summands
from llmexport.plugins.errors import UserError
from llmexport.validate import engine
from llmexport.validate.feeds import ELSEWHERE, Feed
from llmexport.validate.pack import bits
from llmexport.validate.thresholds import block_sizes


class EngineRunner(BaseRunner):  # type: ignore[misc]
    """The engine of one graph, in a process of its own."""

    def __init__(self, export: Export, graph: ExportedGraph) -> None:
        super().__init__(name="engine")
        self._export, self._graph = export, graph
        self._stack = contextlib.ExitStack()

    def activate_impl(self) -> None:
        record = engine_record.read(self._export.folder)
        alone = dataclasses.replace(record, graphs={self._graph.name: record.graphs[self._graph.name]})
        self._session = self._stack.enter_context(engine.started(self._export.folder, alone))

    def infer_impl(self, feed_dict: Feed) -> OrderedDict[str, np.ndarray]:
        outputs = self._session.run(self._graph.name, {n: bits(a) for n, a in feed_dict.items()})
        self.inference_time = self._session.seconds
        ports = [p.typed(self._export.dtype) for p in self._graph.assembly.outputs]
        return OrderedDict((p.name, outputs[p.name].view(np.dtype(p.dtype))) for p in ports)

    def deactivate_impl(self) -> None:
        self._stack.close()


def unable(export: Export) -> str:
    """Why the engine of an export cannot run here, or nothing."""
    try:
        record, _ = engine.check(export.folder)
        built = {name: plan.model_sha256 for name, plan in record.graphs.items()}
        if built != {g.name: g.sha256 for g in export.graphs}:
            return f"it was built of another export than lies there now: {engine_record.rebuild(export.folder, record)}"
    except UserError as error:
        return str(error)
    # What one block alone is run at is not for the user to choose.
    sizes = block_sizes(export.steps[0].block) if export.block is not None else []
    return next(filter(None, (outside(export, s) for s in sizes)), "")


def outside(export: Export, sizes: Mapping[str, int]) -> str:
    """Why the engine does not take these sizes, by axis, or nothing."""
    profile = engine_record.read(export.folder).profile
    # Where nothing is seen, its tower is not run.
    unseen = {IMAGES, TILES, FEATURES} - sizes.keys()
    axes = [axis for axis in profile if not unseen & {*summands(axis)}]
    return engine_record.outside(profile, ((axis, size_of(axis, sizes, ELSEWHERE)) for axis in axes))
