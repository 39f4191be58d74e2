"""A plugin run on numpy arrays, by the host that is part of the product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from plugin_memory import Memory, Output

from llmexport.plugins.host import Desc, Library, Plugin, desc, number

DTYPES = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
BY_NUMBER = {number(t): t for t in (*DTYPES.values(), np.dtype(np.int32), np.dtype(np.uint8))}


def lay_out(
    plugin: Plugin, memory: Memory, inputs: Sequence[np.ndarray], shift: int = 0, most: Sequence[Desc] | None = None
) -> Run:
    """Sets these shapes and lays out every tensor `shift` elements past an aligned address; the workspace, full of
    NaN, is that of a profile whose largest dimensions are those of `most`.
    """
    descs = [desc(x.shape, x.dtype) for x in inputs]
    made = plugin.output_descs(descs)
    io = [*descs, *made]
    plugin.shape_change(io)
    addresses = []
    for x in inputs:
        padding = np.zeros(shift * x.itemsize, np.uint8)
        content = np.concatenate([padding, np.ascontiguousarray(x).reshape(-1).view(np.uint8)])
        addresses.append(memory.place(content) + shift * x.itemsize)
    outputs = [Output.make(memory, d.shape, BY_NUMBER[d.type], shift) for d in made]
    workspace = Output.make(memory, (plugin.workspace(io, most or io),), np.dtype(np.uint8), 0)
    return Run(plugin, io, addresses, outputs, workspace)


def computed(plugin: Plugin, memory: Memory, inputs: Sequence[np.ndarray], shift: int = 0) -> list[np.ndarray]:
    run = lay_out(plugin, memory, inputs, shift)
    run.enqueue(memory.stream)
    return run.results()


@dataclass(frozen=True)
class Run:
    """One prepared enqueue."""

    plugin: Plugin
    io: list[Desc]
    inputs: list[int]
    outputs: list[Output]
    workspace: Output

    def enqueue(self, stream: int | None) -> None:
        addresses = [o.address for o in self.outputs]
        self.plugin.enqueue(self.io, self.inputs, addresses, self.workspace.address, stream)

    def results(self) -> list[np.ndarray]:
        """Raises AssertionError if anything was written beside the outputs and the workspace."""
        self.workspace.read()
        return [o.read() for o in self.outputs]


@dataclass(frozen=True)
class Machine:
    """A library, and the memory of what runs it."""

    library: Library
    memory: Callable[[], Memory]
