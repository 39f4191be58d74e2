"""Computes a parsed network for the feeds of another process, for as long as that one asks."""

from __future__ import annotations

import functools
import math
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmexport.export.binding import Binding, weights
from llmexport.export.identity import WeightFile
from llmexport.export.network.kinds import Array, Unable
from llmexport.export.network.program import Program
from llmexport.export.packed.engine_form import Flipped
from llmexport.export.typed import typed
from llmexport.plugins.dtypes import BY_ONNX

if TYPE_CHECKING:
    import onnx


def serve(trt: Any, network: Any, model: bytes, job: dict[str, Any], tell: Any) -> None:
    """Takes (feed, known) from the job's channel and answers as `Program.run` does, or `Program.apart` if something is
    known; with a text if that cannot be computed."""
    folder = Path(job["model"]).parent
    try:
        program = Program(trt, network, Stored(model, folder, typed(tuple[Flipped, ...], job["flipped"])))
    except Unable as error:
        tell("unknown", str(error))
        return
    bindings, files = typed(dict[str, Binding], job["bindings"]), typed(tuple[WeightFile, ...], job["files"])
    bound = dict(weights(bindings, files, folder))
    tell("ready")
    channel = Connection(job["channel"])
    while True:
        try:
            feed, known = channel.recv()
        except EOFError:
            return
        try:
            feed |= bound
            channel.send(program.run(feed) if known is None else program.apart(feed, known))
        except Unable as error:
            channel.send(str(error))


class Stored:
    """The tensors of a model's file, wherever their bytes lie, as `layers.Stored`; those of 8 bits and more are not
    copied, unless TensorRT was given other bytes (`flipped`)."""

    def __init__(self, model: bytes, folder: Path, flipped: tuple[Flipped, ...] = ()) -> None:
        self._model, self._folder = model, folder
        self._masks = {f.name: f.mask for f in flipped}
        self._files: dict[str, Array] = {}

    @functools.cached_property
    def _held(self) -> tuple[dict[str, onnx.TensorProto], dict[str, onnx.NodeProto]]:
        """By the names that TensorRT gives layers: initialisers and constants; and nodes."""
        import onnx

        graphs = [onnx.ModelProto.FromString(self._model).graph]
        tensors, nodes = dict[str, onnx.TensorProto](), dict[str, onnx.NodeProto]()
        for graph in graphs:
            tensors |= {t.name: t for t in graph.initializer}
            nodes |= {n.name: n for n in graph.node}
            for node in graph.node:
                for attribute in node.attribute:
                    if attribute.HasField("t"):
                        tensors[node.output[0]] = attribute.t
                    graphs += [attribute.g] if attribute.HasField("g") else attribute.graphs
        return tensors, nodes

    def __call__(self, layer: str, place: int | None = None) -> Array:
        import onnx

        tensors, nodes = self._held
        name = layer if place is None or layer not in nodes else nodes[layer].input[place]
        if name not in tensors:
            raise Unable("its weights are not in the model's file")
        tensor = tensors[name]
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return onnx.numpy_helper.to_array(tensor)
        said = {entry.key: entry.value for entry in tensor.external_data}
        file, kind = said["location"], BY_ONNX[tensor.data_type]
        if file not in self._files:
            self._files[file] = np.memmap(self._folder / file, np.uint8, "r")
        start = int(said["offset"])
        held = self._files[file][start : start + math.prod(tensor.dims) * kind.bits // 8]
        if name in self._masks:
            held = held ^ np.uint8(self._masks[name])
        if kind.bits < 8:
            held = np.stack((held & 15, held >> 4), -1).reshape(-1)
        return held.view(kind.name)
