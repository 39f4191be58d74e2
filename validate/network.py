"""The rung `network`: what TensorRT reads of the exported files, computed on this CPU, with no kernel of TensorRT's."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata

from llmexport.export.evaluation import evaluator
from llmexport.export.exported import Export, ExportedGraph
from llmexport.validate.feeds import Feed
from llmexport.validate.runners import metadata


class NetworkRunner(BaseRunner):  # type: ignore[misc]
    """A graph as TensorRT's parser reads it, its plugin layers by the references of their ops.

    plugins: the plugin library, or None for function bodies. timeout: seconds until it is given up that the graph is
    read, or that a call ends.
    """

    def __init__(
        self, export: Export, graph: ExportedGraph, plugins: Path | None = None, timeout: float | None = None
    ) -> None:
        super().__init__(name="TensorRT's network")
        self._export, self._graph = export, graph
        self._plugins, self._timeout = plugins, timeout
        self._stack = contextlib.ExitStack()

    def activate_impl(self) -> None:
        work = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="llmexport-")))
        made = evaluator(self._export, self._graph, work, plugins=self._plugins, timeout=self._timeout)
        self._evaluator = self._stack.enter_context(made)

    def deactivate_impl(self) -> None:
        self._stack.close()

    def get_input_metadata_impl(self) -> TensorMetadata:
        return metadata(self._graph.assembly.inputs, self._export.dtype)

    def infer_impl(self, feed_dict: Feed) -> OrderedDict[str, np.ndarray]:
        start = time.perf_counter()
        made = self._evaluator.run(feed_dict)
        self.inference_time = time.perf_counter() - start
        return OrderedDict((p.name, made[p.name]) for p in self._graph.assembly.outputs)
