"""Computes a parsed network for the feeds of another process, for as long as that one asks."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmexport.export.network.kinds import Array, Unable
from llmexport.export.network.program import Program
from llmexport.plugins.dtypes import BY_ONNX

if TYPE_CHECKING:
    import onnx


def serve(trt: Any, network: Any, model: bytes, job: dict[str, Any], tell: Any) -> None:
    """Takes (feed, known) from the job's channel and answers as `Program.run` does, or `Program.apart` if something is
    known; with a text if that cannot be computed."""
    try:
        program = Program(trt, network, Stored(model, Path(job["model"]).parent))
    except Unable as error:
        tell("unknown", str(error))
        return
    tell("ready")
    channel = Connection(job["channel"])
    while True:
        try:
            feed, known = channel.recv()
        except EOFError:
            return
        try:
            channel.send(program.run(feed) if known is None else program.apart(feed, known))
        except Unable as error:
            channel.send(str(error))


class Stored:
    """The tensors of a model's file by name, wherever their bytes lie; none is copied."""

    def __init__(self, model: bytes, folder: Path) -> None:
        self._model, self._folder = model, folder
        self._tensors: dict[str, onnx.TensorProto] | None = None
        self._files: dict[str, Array] = {}

    def __call__(self, name: str) -> Array:
        import onnx

        if self._tensors is None:
            self._tensors = dict(_tensors(onnx.ModelProto.FromString(self._model).graph))
        if name not in self._tensors:
            raise Unable("its weights are not in the model's file")
        tensor = self._tensors[name]
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return onnx.numpy_helper.to_array(tensor)
        said = {entry.key: entry.value for entry in tensor.external_data}
        file = said["location"]
        if file not in self._files:
            self._files[file] = np.memmap(self._folder / file, np.uint8, "r")
        start, size = int(said["offset"]), int(said["length"])
        return self._files[file][start : start + size].view(BY_ONNX[tensor.data_type].name)


def _tensors(graph: onnx.GraphProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Initialisers, and what nodes hold as constants, by the name that TensorRT gives their layer."""
    yield from ((t.name, t) for t in graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield node.name, attribute.t
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from _tensors(inner)
