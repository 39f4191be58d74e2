"""What a decoder sees of the text that an encoder has read."""

from __future__ import annotations

from dataclasses import dataclass

from llmexport.export.spec.axis import BATCH, SEQUENCE, SOURCE
from llmexport.export.spec.block import Block, Port, hidden
from llmexport.export.spec.mixer import Mixer

SOURCE_IDS = Port("input_ids", (BATCH, SOURCE), "int64", "tokens")
SOURCE_PADDING = Port("attention_mask", (BATCH, SOURCE), "int64", "padding")


@dataclass(frozen=True)
class CrossKeys(Block):
    """The keys and values that one layer of a decoder sees of an encoder's text: they are made once for all steps."""

    hidden: int
    heads: int
    head_size: int

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (hidden("encoded", self.hidden, (BATCH, SOURCE)),)

    @property
    def outputs(self) -> tuple[Port, ...]:
        return cross_keys(self.heads, self.head_size)


@dataclass(frozen=True)
class CrossMask(Block):
    """Every token of a step sees all tokens of the encoder's text and no padding; of a text that is all padding it sees
    all, so that no backend makes a NaN."""

    @property
    def inputs(self) -> tuple[Port, ...]:
        step = Port("decoder_input_ids", (BATCH, SEQUENCE), "int64", "tokens")
        return (Port("encoder_attention_mask", (BATCH, SOURCE), "int64", "padding"), step)

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (Port("cross_mask", (BATCH, 1, SEQUENCE, SOURCE), "bool", "mask"),)


@dataclass(frozen=True)
class CrossAttention(Mixer):
    """Attention of a decoder's tokens to an encoder's text, whose keys and values are inputs (modeling_t5.py).

    `scale` is that of the logits.
    """

    heads: int
    head_size: int
    scale: float

    @property
    def context(self) -> tuple[Port, ...]:
        return (*cross_keys(self.heads, self.head_size), *CrossMask().outputs)


def cross_keys(heads: int, size: int, suffix: str = "") -> tuple[Port, Port]:
    """Keys and values of an encoder's text, as one layer of a decoder reads them."""
    shape = (BATCH, heads, SOURCE, size)
    return Port(f"cross_key{suffix}", shape), Port(f"cross_value{suffix}", shape)
