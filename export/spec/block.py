"""Blocks and their ports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from llmexport.export.spec.axis import BATCH, SEQUENCE, TOTAL
from llmexport.export.spec.storage import Stored
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
    def stored(self) -> Mapping[str, Stored]:
        """By their paths, the parameters that a Storage speaks of. All others are floats, cast to the model's type."""
        return {path + own: s for block, path in self.parts.values() for own, s in block.stored.items()}

    def dtype_of(self, path: str) -> str:
        """The type of a parameter, as `Stored.dtype` says it."""
        return self.stored[path].dtype if path in self.stored else "T"


def hidden(name: str, width: int) -> Port:
    """A port of hidden states."""
    return Port(name, (BATCH, SEQUENCE, width))


INPUT_IDS = Port("input_ids", (BATCH, SEQUENCE), "int64")
ATTENTION_MASK = Port("attention_mask", (BATCH, TOTAL), "int64")
