"""The forms that an export is run in, each a rung of the ladder: what runs a graph of it, and why one cannot here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from polygraphy.backend.base import BaseRunner

from llmexport.export import graph_file
from llmexport.export.exported import Export, ExportedGraph
from llmexport.validate.drive import Recorded
from llmexport.validate.runners import not_runnable, onnx_runner


def _no_trace(export: Export, recorded: Recorded) -> str:
    return ""


@dataclass(frozen=True)
class Form:
    """What an export runs as.

    rung: its name after `--rungs`. title: of what is compared with what. unable: why it cannot run here, or nothing;
    its second argument says that the user asked for it by name, so that a large model is no reason. runner: runs a
    graph, by the names of its ports. against: the form that it is compared with in fp32, where that can run; else our
    PyTorch. trace: of a failed rung, the place where the numbers part, given all values of our PyTorch, or nothing.
    """

    rung: str
    title: str
    unable: Callable[[Export, bool], str]
    runner: Callable[[Export, ExportedGraph], BaseRunner]
    against: Form | None = None
    trace: Callable[[Export, Recorded], str] = _no_trace


ONNX_RUNTIME = Form(
    rung="onnxruntime",
    title="ONNX Runtime / PyTorch",
    unable=lambda export, asked: not_runnable(export.dtype),
    runner=lambda export, graph: onnx_runner(graph_file.load(export, graph), export.folder),
)

FORMS = (ONNX_RUNTIME,)
