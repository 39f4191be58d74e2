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
from llmexport.export.packed.given import Given
from llmexport.export.typed import typed
from llmexport.plugins.dtypes import BY_ONNX

if TYPE_CHECKING:
    import onnx


def serve(trt: Any, network: Any, model: bytes, job: dict[str, Any], tell: Any) -> None:
    """Takes (feed, known) from the job's channel and answers as `Program.run` does, or `Program.apart` if something is
    known; with a text if that cannot be computed."""
    folder = Path(job["model"]).parent
    try:
        program = Program(trt, network, Stored(model, folder, typed(tuple[Given, ...], job["given"])))
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
    copied, unless TensorRT was `given` other bytes."""

    def __init__(self, model: bytes, folder: Path, given: tuple[Given, ...] = ()) -> None:
        self._model, self._folder = model, folder
        self._given = {g.name: g for g in given}
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
        kind = BY_ONNX[tensor.data_type]
        held = self._given[name].read(self._folder) if name in self._given else self._mapped(tensor, kind.bits)
        if kind.bits < 8:
            held = np.stack((held & 15, held >> 4), -1).reshape(-1)
        return held.view(kind.name)

    def _mapped(self, tensor: onnx.TensorProto, bits: int) -> Array:
        """The bytes of a tensor as they lie in its file."""
        said = {entry.key: entry.value for entry in tensor.external_data}
        file, start = said["location"], int(said["offset"])
        if file not in self._files:
            self._files[file] = np.memmap(self._folder / file, np.uint8, "r")
        return self._files[file][start : start + math.prod(tensor.dims) * bits // 8]
