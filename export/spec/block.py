"""Blocks and their ports."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from llmexport.export.spec.axis import BATCH, SEQUENCE, TOTAL, WRITTEN
from llmexport.export.spec.storage import Stored
from llmexport.plugins.dtypes import FLOATS

OPSET = 23  # ai.onnx, of every block that does not ask for a later one
DTYPES = FLOATS
Dim = int | str
# What the numbers at a port are: whoever feeds one asks this, and never its name.
Use = Literal[
    "hidden",  # hidden states, and all that is like them
    "logits",  # a score of each word of the vocabulary
    "tokens",  # ids of words
    "token_types",  # the segment that each token is of
    "positions",  # where a token stands in its row
    "padding",  # 1 for a token, 0 for padding, along the row so far
    "padding_length",  # how many slots of a row are before its first token
    "past_length",  # how many were written before this step
    "mask",  # which keys each query sees
    "bias",  # what is added to the logits of attention, far below all of them where a query does not see a key
    "relative",  # a vector for each distance of a query from a key
    "distances",  # which of them each pair of a query and a key takes
    "span_start",  # where the keys of a row begin
    "span_length",  # where they end
    "presence",  # 1 for a token, 0 for padding, along this step
    "presence_end",  # where this step's tokens of a row end
    "shown",  # which tokens of this step all of their row see
    "cos",  # cosines of the angles that RoPE turns by
    "sin",  # their sines
    "temperature",  # a factor of each query
    "routing_weights",  # how much each chosen expert counts
    "routing_experts",  # their numbers, no two alike
    "pixels",  # colours of pictures
    "grid",  # of each picture, how many patches it has in time, height and width
    "places",  # of each patch, in which row and column of its picture it is
    "extents",  # and how many rows and columns that has
    "segments",  # the number of the frame that each patch is of
    "pictures",  # of each token of this step, the number of the picture that it stands for in its row, 0 for text
    "features",  # what takes the place of the embeddings of this step's tokens that stand for pictures
    "state",  # keys, values or inputs that a block kept of earlier tokens
    "slots",  # keys or values, each token's in its own slot, the first token's in the first one
    "window",  # keys or values of the last tokens, the latest one's in the last place
    "recurrence",  # a sum over all earlier tokens, zero before the first
    "weight_sum",  # the sum of their weights, zero before the first and at least 1 behind it
]


@dataclass(frozen=True)
class Port:
    """A named input or output of a block. `dtype` "T" is the dtype that the model is exported in."""

    name: str
    shape: tuple[Dim, ...]
    dtype: str = "T"
    use: Use = "hidden"

    def typed(self, dtype: str) -> Port:
        """The port in a model that is exported in `dtype`."""
        return dataclasses.replace(self, dtype=dtype) if self.dtype == "T" else self


@dataclass(frozen=True)
class State:
    """What a block carries from one step to the next: `present` of a step is `past` of the next.

    A state whose two shapes differ grows. One of use "slots" is written in place: both may be one buffer.
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
    def most(self) -> Mapping[str, int]:
        """Axis -> the largest size that it takes, where there is one, as a table has no more rows."""
        return {}

    @property
    def opset(self) -> int:
        """The version of ai.onnx that its graph needs."""
        return max((block.opset for block, _ in self.parts.values()), default=OPSET)

    @property
    def stored(self) -> Mapping[str, Stored]:
        """By their paths, the parameters that a Storage speaks of. All others are floats, cast to the model's type."""
        return {path + own: s for block, path in self.parts.values() for own, s in block.stored.items()}

    @property
    def spare(self) -> tuple[str, ...]:
        """The paths of weights that a checkpoint may hold and the block does not read."""
        return ()

    def dtype_of(self, path: str) -> str:
        """The type of a parameter, as `Stored.dtype` says it."""
        return self.stored[path].dtype if path in self.stored else "T"


def hidden(name: str, width: int, axes: tuple[Dim, Dim] = (BATCH, SEQUENCE)) -> Port:
    """A port of hidden states, along these axes of rows and of tokens."""
    return Port(name, (*axes, width))


def state(name: str, past: tuple[Dim, ...], present: tuple[Dim, ...], dtype: str = "T", use: Use = "state") -> State:
    """A state of this name and of these shapes."""
    return State(Port(f"past_{name}", past, dtype, use), Port(f"present_{name}", present, dtype, use))


INPUT_IDS = Port("input_ids", (BATCH, SEQUENCE), "int64", "tokens")
POSITION_IDS = Port("position_ids", (BATCH, SEQUENCE), "int64", "positions")
PLACES = Port("places", (2, BATCH, SEQUENCE), "int64", "positions")
SHOWN = Port("shown", (BATCH, SEQUENCE), "bool", "shown")
TOKEN_TYPE_IDS = Port("token_type_ids", (BATCH, SEQUENCE), "int64", "token_types")
ATTENTION_MASK = Port("attention_mask", (BATCH, TOTAL), "int64", "padding")
STEP_MASK = Port("attention_mask", (BATCH, SEQUENCE), "int64", "padding")
SLOT_MASK = Port("attention_mask", (BATCH, WRITTEN), "int64", "padding")
PADDING_LENGTH = Port("padding_length", (BATCH,), "int64", "padding_length")
PAST_LENGTH = Port("past_length", (BATCH,), "int64", "past_length")
PICTURES = Port("pictures", (BATCH, SEQUENCE), "int64", "pictures")
TOKENS_END = Port("tokens_end", (BATCH,), "int32", "presence_end")
# What a block that must not see padding reads.
PRESENCE = (Port("present_tokens", (BATCH, SEQUENCE), use="presence"), TOKENS_END)
