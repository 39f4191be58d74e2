"""The forms that an export is run in, each a rung of the ladder: what runs a graph of it, and why one cannot here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from polygraphy.backend.base import BaseRunner

from llmexport.export import graph_file
from llmexport.export.exported import Export, ExportedGraph
from llmexport.validate import engine_form, kernels, network
from llmexport.validate.drive import Recorded
from llmexport.validate.runners import not_runnable, onnx_runner


@dataclass(frozen=True)
class Form:
    """What an export runs as.

    rung: its name after `--rungs`. name: of what runs, in a report. unable: why it cannot run here, or nothing;
    its second argument says that the user asked for it by name, so that a large model is no reason. runner: runs a
    graph, by the names of its ports. against: the form that it is compared with in fp32, where that can run; else our
    PyTorch. trace: of a failed rung, the place where the numbers part, given all values of our PyTorch, or nothing; it
    may raise what the runner does. outside: why it does not take these sizes, by axis, or nothing. note: what else is
    to be known of a rung that was run. timed: its seconds are those of something that is deployed. doing: what the user
    waits for once it is asked for by name, or nothing: the name says it.
    """

    rung: str
    name: str
    unable: Callable[[Export, bool], str]
    runner: Callable[[Export, ExportedGraph], BaseRunner]
    against: Form | None = None
    trace: Callable[[Export, Recorded], str] = lambda export, recorded: ""
    outside: Callable[[Export, Mapping[str, int]], str] = lambda export, sizes: ""
    note: Callable[[Export], str] = lambda export: ""
    timed: bool = True
    doing: Callable[[], str] = lambda: ""

    def title(self, beside: Form | None = None) -> str:
        """What is compared with what: with our PyTorch, if no other form is given."""
        return f"{self.name} / {beside.name if beside else 'PyTorch'}"


ONNX_RUNTIME = Form(
    rung="onnxruntime",
    name="ONNX Runtime",
    unable=lambda export, asked: not_runnable(export.dtype),
    runner=lambda export, graph: onnx_runner(graph_file.load(export, graph), export.folder),
)

NETWORK = Form(
    rung="network",
    name="TensorRT's network",
    unable=network.unable,
    runner=network.NetworkRunner,
    against=ONNX_RUNTIME,
    trace=network.trace,
    note=network.form,
    timed=False,
)

KERNELS = Form(
    rung="kernels",
    name="kernels",
    unable=kernels.unable,
    runner=kernels.runner,
    trace=kernels.trace,
    note=kernels.note,
    timed=False,
    doing=kernels.doing,
)

ENGINE = Form(
    rung="engine",
    name="engine",
    unable=lambda export, asked: engine_form.unable(export),
    runner=engine_form.EngineRunner,
    against=ONNX_RUNTIME,
    outside=engine_form.outside,
)

FORMS = (ONNX_RUNTIME, NETWORK, KERNELS, ENGINE)
