"""What TensorRT reads of a graph, computed on this CPU by the builder's process (`network/`), feed by feed."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from llmexport.export import builder, engine_job
from llmexport.export.binding import Binding
from llmexport.export.engine import check_plugins, check_ports
from llmexport.export.engine_backend import check_backend
from llmexport.export.errors import EngineError
from llmexport.export.exported import Export, ExportedGraph
from llmexport.export.spec import Port
from llmexport.plugins import library

Values = dict[str, np.ndarray]


class Uncomputed(EngineError):
    """A layer that TensorRT read and that cannot be computed here, or not of these numbers."""


@dataclass(frozen=True)
class Evaluator:
    """A parsed network in a process of its own, `nodes` of it by plugins, as of `engine_job.Job`; `timeout` is in
    seconds and of each call.

    Every call raises Uncomputed where a layer cannot be computed, EngineError if the process dies.
    """

    work: Path
    nodes: Mapping[str, str]
    child: subprocess.Popen[str]
    channel: Connection
    timeout: float | None
    messages: builder.Messages

    def run(self, feed: Mapping[str, np.ndarray]) -> Values:
        """The network's outputs."""
        return self._ask(dict(feed), None)

    def apart(self, feed: Mapping[str, np.ndarray], known: Mapping[str, np.ndarray]) -> tuple[Values, dict[str, str]]:
        """What each layer makes of what is known of its inputs, and which layer that is; both by tensor, in the order
        in which they are made."""
        return self._ask(dict(feed), dict(known))

    def _ask(self, feed: Values, known: Values | None) -> Any:
        with builder.limited(self.child, self.timeout) as late:
            try:
                self.channel.send((feed, known))
                answer = self.channel.recv()
            except (EOFError, OSError) as error:
                raise self.died(late()) from error
        if isinstance(answer, str):
            raise Uncomputed(f"TensorRT's network cannot be computed: {answer}")
        return answer

    def read(self, check: Callable[[builder.Network], None]) -> None:
        """Waits until TensorRT has read the model, and until it is known how to compute all of it."""
        with builder.limited(self.child, self.timeout) as late:
            for event in builder.events(self.child, self.messages):
                match event:
                    case builder.Network():
                        check(event)
                    case ["unknown", reason]:
                        raise Uncomputed(f"TensorRT's network cannot be computed: {reason}")
                    case ["ready"]:
                        return
            raise self.died(late())

    def died(self, late: bool) -> EngineError:
        how = f"was stopped after {self.timeout:g} s" if late else builder.reason(self.child.wait())
        return builder.died(self.work, how, self.messages)


@contextlib.contextmanager
def evaluator(
    export: Export,
    graph: ExportedGraph,
    work: Path,
    *,
    backend: str = "tensorrt-rtx",
    plugins: Path | None = None,
    weights: str = "inside",
    timeout: float | None = None,
) -> Iterator[Evaluator]:
    """A graph of an export as TensorRT reads it; `work` is an empty folder for its process.

    plugins, weights: as of `engine.build`. timeout: seconds until it is given up that the graph is read, or that a
    call ends. Raises EngineError, of which Uncomputed on a layer that is not known here.
    """
    module = check_backend(backend).module
    served = library.served(plugins) if plugins else frozenset()
    job = engine_job.prepare(export, graph, module, plugins, served, weights)
    ours, theirs = Pipe()
    with ours:
        with theirs:
            bindings = {n: dataclasses.asdict(b) for n, b in job.bindings.items()}
            files = [dataclasses.asdict(w) for w in export.weights]
            job.write(work, channel=theirs.fileno(), bindings=bindings, files=files)
            process = contextlib.ExitStack()
            child = process.enter_context(builder.builder(work, module, theirs.fileno()))
        with process:
            made = Evaluator(work, job.nodes, child, ours, timeout, collections.deque(maxlen=20))
            made.read(lambda read: _check(read, export, graph, job.nodes, job.bindings))
            yield made


def _check(
    read: builder.Network,
    export: Export,
    graph: ExportedGraph,
    nodes: dict[str, str],
    bindings: Mapping[str, Binding],
) -> None:
    check_plugins(nodes, read.plugins)
    weights = tuple(Port(n, b.shape, b.dtype) for n, b in bindings.items())
    for ports, found in (((*graph.assembly.inputs, *weights), read.inputs), (graph.assembly.outputs, read.outputs)):
        check_ports(tuple(p.typed(export.dtype) for p in ports), found)
