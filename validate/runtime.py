"""ONNX Runtime's session of a graph of an export, on the CPU; nothing here imports torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import TensorProto

from llmexport.export.values import one_line
from llmexport.validate.compare import Mismatch

# Since 1.29 it tells its makers of every session, models' names and hashes included, and leaves a file among the
# temporary ones: it is asked not to, before it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime
from onnxruntime import InferenceSession, OrtValue, SessionOptions
from onnxruntime.capi import onnxruntime_pybind11_state

__all__ = ["OLDEST_RUNTIME", "REFUSALS", "InferenceSession", "OrtValue", "SessionOptions", "open_session", "version"]
OLDEST_RUNTIME: tuple[int, ...] = (1, 23, 2)  # of ONNX Runtime; pyproject.toml names it too
OLDEST_STATIC: tuple[int, ...] = (1, 25)  # that runs a static cache
OLDEST_EXPERTS: tuple[int, ...] = (1, 26)  # that runs experts in int4 of the target onnxruntime
FLOATS = 1  # the accuracy level of MatMulNBits that computes in float32
STOPS: tuple[type[Exception], ...] = tuple(
    e for e in vars(onnxruntime_pybind11_state).values() if isinstance(e, type) and issubclass(e, Exception)
)
REFUSALS: tuple[type[Exception], ...] = (RuntimeError, *STOPS)


class NotTaken(Mismatch):
    """A model that ONNX Runtime does not take."""


STOPPED: tuple[type[Exception], ...] = (NotTaken, *STOPS)


def version() -> str:
    return str(onnxruntime.__version__)


def open_session(
    model: onnx.ModelProto, weights: Path, options: SessionOptions | None = None, *, fused: bool = False
) -> InferenceSession:
    """A session of `model`; `weights` is the folder that external data lies in.

    Products are those of the numbers that matrices in few bits mean, which are made wide when it is opened, unless
    MatMulNBits reads them. If products may be `fused`, ONNX Runtime keeps integers packed, and may round what they are
    multiplied with to 8 bits.

    Raises Mismatch, in one line, if the ONNX Runtime here is too old for it, and NotTaken if it refuses the model.
    """
    installed = onnxruntime.__version__
    oldest, lack = OLDEST_RUNTIME, "whose Attention is wrong where heads share a key"
    ops = {node.op_type for node in _nodes(model.graph)}
    if "QMoE" in ops:
        oldest, lack = OLDEST_EXPERTS, "whose QMoE takes no weights of a router, and this model's experts are its"
    elif {"TensorScatter", "GroupQueryAttention"} & ops:
        oldest, lack = OLDEST_STATIC, "on which no static cache was tried, and this model has one"
    if tuple(int(n) for n in re.findall(r"\d+", installed)[:3]) < oldest:
        raise Mismatch(
            f"ONNX Runtime {installed} is installed, {lack}: upgrade onnxruntime-gpu, or onnxruntime if that is what "
            f"is installed, to {'.'.join(map(str, oldest))} or later"
        )
    options = options or SessionOptions()
    options.log_severity_level = 3
    if not fused and "MatMulNBits" in ops:
        model = _exact(model)
    if not (fused and _all_integers(model)):
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights.resolve()))
    try:
        return InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except REFUSALS as error:
        said = one_line(error)
        raise NotTaken(f"ONNX Runtime {installed} does not take the model: {said}") from error


def _exact(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model whose products by packed numbers round nothing that they are multiplied with."""
    exact = onnx.ModelProto()
    exact.CopyFrom(model)
    for node in (n for n in exact.graph.node if n.op_type == "MatMulNBits"):
        next(a for a in node.attribute if a.name == "accuracy_level").i = FLOATS
    return exact


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Those of its branches too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from _nodes(attribute.g)


def _all_integers(model: onnx.ModelProto) -> bool:
    """Whether all that is dequantised is integers, of which alone ONNX Runtime's CPU has products."""
    floats = {t.name for t in model.graph.initializer if "FLOAT8" in TensorProto.DataType.Name(t.data_type)}
    return floats.isdisjoint(n for node in model.graph.node if node.op_type == "DequantizeLinear" for n in node.input)
