"""Blocks and their ports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from llmexport.export.spec.axis import BATCH, SEQUENCE, TOTAL
from llmexport.plugins.dtypes import FLOATS

OPSET = 23  # ai.onnx, of everything that is exported
DTYPES = FLOATS
Dim = int | str


@dataclass(frozen=True)
class Port:
    """A named input or output of a block. `dtype` "T" is the dtype that the model is exported in."""

    name: str
    shape: tuple[Dim, ...]
    dtype: str = "T"


@dataclass(frozen=True)
class State:
    """What a block carries from one step to the next: `present` of a step is `past` of the next.

    A state whose two shapes differ grows.
    """

    past: Port
    present: Port


@dataclass(frozen=True)
class Block:
    """Base of all blocks; `kind` is the name of the class in snake case, and of `--block`."""

    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type[Block]]] = {}

    def __init_subclass__(cls) -> None:
        cls.kind = "".join("_" + c.lower() if c.isupper() else c for c in cls.__name__).lstrip("_")
        Block.kinds[cls.kind] = cls

    @property
    def inputs(self) -> tuple[Port, ...]:
        raise NotImplementedError(self.kind)

    @property
    def outputs(self) -> tuple[Port, ...]:
        raise NotImplementedError(self.kind)

    @property
    def label(self) -> str:
        """What tells it from others of its kind in one model, if it has a name for that."""
        return self.kind

    @property
    def parts(self) -> Mapping[str, tuple[Block, str]]:
        """The blocks inside: field -> block and the path of its parameters in this block's module."""
        return {}

    @property
    def states(self) -> tuple[State, ...]:
        """What it carries; each `past` is among its inputs and each `present` among its outputs."""
        return ()

    @property
    def as_stored(self) -> tuple[str, ...]:
        """Paths of the parameters that its graph takes in the type they are stored in, whatever its own is."""
        return tuple(path + own for block, path in self.parts.values() for own in block.as_stored)


def hidden(name: str, width: int) -> Port:
    """A port of hidden states."""
    return Port(name, (BATCH, SEQUENCE, width))


INPUT_IDS = Port("input_ids", (BATCH, SEQUENCE), "int64")
ATTENTION_MASK = Port("attention_mask", (BATCH, TOTAL), "int64")
