"""A graph of placed blocks, as data: the one description that the stitcher, our PyTorch and the manifest share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmexport.export.spec.block import Block, Port

ONLY = "model"  # the name of a graph that is all of its model


@dataclass(frozen=True)
class Step:
    """One block at its place. `inputs` and `outputs` name the values at the block's ports, in order.

    `path` is where the block's parameters start in the model, as `layers.3.`; Arch.names knows such paths.
    """

    name: str
    block: Block
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    path: str

    @property
    def reads(self) -> Mapping[str, str]:
        """Input port of the block -> value."""
        return dict(zip((p.name for p in self.block.inputs), self.inputs, strict=True))

    @property
    def makes(self) -> Mapping[str, str]:
        """Output port of the block -> value."""
        return dict(zip((p.name for p in self.block.outputs), self.outputs, strict=True))


@dataclass(frozen=True)
class Part:
    """A block at its place in a model, which may be inside another; `path` is as a Step's."""

    name: str
    block: Block
    path: str


@dataclass(frozen=True)
class Assembly:
    """A graph of blocks: what goes in, the steps, what comes out. Ports here are named by value.

    A value has one name for the whole graph; a weight is named as in the checkpoint.
    """

    inputs: tuple[Port, ...]
    steps: tuple[Step, ...]
    outputs: tuple[Port, ...]

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The distinct blocks, in order of first use."""
        return tuple(dict.fromkeys(s.block for s in self.steps))

    @property
    def opset(self) -> int:
        """The version of ai.onnx that it needs."""
        return max(b.opset for b in self.blocks)


@dataclass(frozen=True)
class Graph:
    """A named graph; `carried` says which output of a step is which input of the next: past value -> present value."""

    name: str
    assembly: Assembly
    carried: Mapping[str, str]
