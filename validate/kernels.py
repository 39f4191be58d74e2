"""Our PyTorch with every op of ours computed by its kernels, through the plugin: on a GPU, or on the CPU emulator."""

from __future__ import annotations

import inspect
import itertools
import math
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmexport.export.exported import Export, ExportedGraph
from llmexport.export.spec import Step
from llmexport.export.values import one_line
from llmexport.plugins import emulated, library
from llmexport.plugins.errors import PluginError
from llmexport.plugins.host import Library, Plugin, Refused, desc, dtype_name
from llmexport.plugins.spec import Attribute, Op, all_ops
from llmexport.validate.compare import compare
from llmexport.validate.cost import multiply_adds
from llmexport.validate.drive import Recorded
from llmexport.validate.feeds import Feed
from llmexport.validate.fused import Sums, fuse
from llmexport.validate.judge import feeds_alone
from llmexport.validate.runners import TorchRunner, to_numpy
from llmexport.validate.tolerance import TOLERANCE

# Of a prompt on the emulator: a minute on one core where experts and a delta rule are, at 1e7 a second.
MOST = 5e8


@dataclass(frozen=True)
class Machine:
    """A plugin library, and torch's name of the device that runs its kernels."""

    path: Path
    device: str


def machine() -> Machine:
    """What kernels run on here: a GPU with a library for it, else the emulator, which is built if need be.

    Raises PluginError with what is missing and how to get it.
    """
    return on_gpu() or Machine(emulated.find() or emulated.build(), "cpu")


def on_gpu() -> Machine | None:
    """The GPU, where torch has one and a library for GPUs is there."""
    path = library.find() if torch.cuda.is_available() else None
    return Machine(path, "cuda") if path else None


class Kernels(TorchDispatchMode):
    """Within it, torch calls the library's plugins in place of our ops' references.

    calls: how often each op was. If `checked`, each call is held against the reference on the same inputs, and `wrong`
    says of the first that is not right where that was, by the `place` that whoever runs a step has set.
    """

    def __init__(self, on: Machine, *, checked: bool = False) -> None:
        super().__init__()
        library.served(on.path)  # refuses a file that others can have written
        self._library, self.device, self._checked = Library(on.path), on.device, checked
        self._ops = {getattr(torch.ops.llmexport, op.torch_name).default: op for op in all_ops().values()}
        self._plugins: dict[tuple[object, ...], Plugin] = {}
        self.calls: Counter[str] = Counter()
        self.place = self.wrong = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        op = self._ops.get(func)
        if op is None:
            return func(*args, **(kwargs or {}))
        given = inspect.signature(op.reference).bind(*args, **(kwargs or {})).arguments
        made = self._compute(op, given)
        self.calls[op.name] += 1
        if self._checked and not self.wrong:
            self.wrong = self._judge(op, given, made)
        return made[0] if len(made) == 1 else tuple(made)

    def _compute(self, op: Op, given: Mapping[str, Any]) -> list[Tensor]:
        """What the op's plugin makes. Raises Refused, with the sizes of the node, if it does not take it."""
        inputs = [given[n].contiguous() for n in op.inputs if given[n] is not None]
        descs = [desc(t.shape, t.dtype) for t in inputs]
        attributes = {n: kind(given[n]) for n, kind in op.attributes.items()}
        try:
            plugin = self._plugin(op, attributes)
            expected, scratch = plugin.prepare(descs)
            outputs = [_unwritten(d.shape, dtype_name(d.type), self.device) for d in expected]
            workspace = torch.empty(scratch, dtype=torch.uint8, device=self.device)
            stream = torch.cuda.current_stream().cuda_stream if self.device == "cuda" else None
            read, made = ([t.data_ptr() for t in tensors] for tensors in (inputs, outputs))
            plugin.enqueue([*descs, *expected], read, made, workspace.data_ptr(), stream)
        except Refused as error:
            sizes = ", ".join(f"{n} {str(t.dtype)[6:]}{list(t.shape)}" for n, t in zip(op.inputs, inputs, strict=False))
            raise Refused(f"{error} ({sizes})") from error
        return outputs

    def _judge(self, op: Op, given: Mapping[str, Any], made: Sequence[Tensor]) -> str:
        """Which output is further from its reference than two right runs of one step may be; nothing if none is."""
        expected = op.reference(**given)
        dtype = str(made[0].dtype).removeprefix("torch.")
        for name, right, found in zip(op.outputs, expected if len(made) > 1 else (expected,), made, strict=True):
            times = compare(to_numpy(right), to_numpy(found)).excess(TOLERANCE[dtype])
            if times > 1:
                far = f"{times:.3g} times as far from its reference on the same inputs as is allowed"
                lost = "not finite, or its reference on the same inputs is not"
                return f"{self.place}: {name} of {op.name} is {far if math.isfinite(times) else lost}"
        return ""

    def _plugin(self, op: Op, attributes: Mapping[str, Attribute]) -> Plugin:
        """One for each node's attributes, as an engine has it that was written and read."""
        key = (op.name, *attributes.values())
        if key not in self._plugins:
            self._plugins[key] = self._library.create(op.name, attributes).recreate().attach()
        return self._plugins[key]


def _unwritten(shape: tuple[int, ...], dtype: str, device: str) -> Tensor:
    """Memory in which what no kernel writes is seen: NaN, or a number that is no expert's."""
    kind = getattr(torch, dtype)
    return torch.full(shape, torch.nan if kind.is_floating_point else -1, dtype=kind, device=device)


class KernelRunner(TorchRunner):
    """A graph in PyTorch whose ops of ours are computed by kernels."""

    def __init__(self, export: Export, graph: ExportedGraph, kernels: Kernels) -> None:
        super().__init__(export, graph, kernels.device)
        self.name = "kernels"
        self._kernels, self._place, self._sums = kernels, partial(export.place, graph.name), Sums()
        self._fused: WeakSet[torch.nn.Module] = WeakSet()

    def infer_impl(self, feed_dict: Feed) -> OrderedDict[str, np.ndarray]:
        """Raises PluginError unless kernels computed all ops of the graph's file."""
        before = self._kernels.calls.copy()
        with self._kernels, self._sums:
            made = super().infer_impl(feed_dict)
        calls = self._kernels.calls - before
        if left := [op for op, count in self._graph.ops.items() if calls[op] < count]:
            told = f"{self._graph.ops[left[0]]} times, a kernel computed it {calls[left[0]]} times"
            raise PluginError(f"{self._graph.file} has {left[0]} {told}")
        return made

    def run_step(self, step: Step, feed: Feed) -> Feed:
        with self._kernels, self._sums:
            return super().run_step(step, feed)

    def _module(self, step: Step) -> torch.nn.Module:
        self._kernels.place = self._place(step.name)
        module = super()._module(step)
        if module not in self._fused:
            fuse(module, self._sums, self._graph.ops)
            self._fused.add(module)
        return module


def unable(export: Export, asked: bool) -> str:
    """Why the kernels cannot run this export here, or nothing. If they are asked for, the emulator is built."""
    if not any(g.ops for g in export.graphs):
        return "no op of ours is in this model"
    try:
        if asked or on_gpu():
            machine()
            return ""
        if emulated.find() is None:
            return "the kernels are not compiled for this CPU: llmexport plugins build --emulated, which takes a minute"
    except PluginError as error:
        return one_line(error)
    products = multiply_adds(export)
    large = f"a prompt takes {products:.0e} multiply-adds, over {MOST:.0e}: --rungs kernels runs it anyway"
    return large if products > MOST else ""


def doing() -> str:
    """What a user waits for beside the run itself, or nothing."""
    try:
        built = on_gpu() or emulated.find() or emulated.missing()
    except PluginError as error:
        built = str(error)  # which is why the rung cannot be run
    return "" if built else "kernels, compiled for this CPU once, in a minute"


def runner(export: Export, graph: ExportedGraph) -> KernelRunner:
    return KernelRunner(export, graph, Kernels(machine()))


def note(export: Export) -> str:
    """Where the kernels ran."""
    return "on the CPU emulator" if machine().device == "cpu" else f"on {torch.cuda.get_device_name()}"


def trace(export: Export, recorded: Recorded) -> str:
    """The first op that leaves what its reference allows, and its step: on what PyTorch computed, then on random
    inputs, of which some are a token after others."""
    kernels = Kernels(machine(), checked=True)
    for graph in export.graphs:
        steps, ran = graph.assembly.steps, KernelRunner(export, graph, kernels)
        held = [(stage, values[graph.name]) for stage, values in recorded.items() if graph.name in values]
        of_torch = ((step, stage, values) for stage, values in held for step in steps)
        drawn = ((step, run, feed) for step in steps for run, feed in feeds_alone(step, export.dtype, seed=0))
        for step, run, feed in itertools.chain(of_torch, drawn):
            ran.run_step(step, feed)
            if kernels.wrong:
                return f"{run}: {kernels.wrong}"
    return "every op is right by itself"
