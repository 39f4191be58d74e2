"""What each layer is told of its tokens beside the hidden states (modeling_gemma4.py, per-layer inputs)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmexport.export.spec.block import BATCH, INPUT_IDS, SEQUENCE, Block, Port, hidden
from llmexport.export.spec.feed_forward import Activation
from llmexport.export.spec.mixer import Norm


@dataclass(frozen=True)
class PerLayerEmbedding(Block):
    """`norm.size` numbers a token for each of `layers`: what one table for all layers says of the token, and a normed
    projection of its embedding, by halves. The table's rows are scaled by the root of that size."""

    vocabulary: int
    hidden: int
    layers: int
    norm: Norm

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (INPUT_IDS, hidden("hidden", self.hidden))

    @property
    def outputs(self) -> tuple[Port, ...]:
        return tuple(Port(f"layer_input_{i}", (BATCH, SEQUENCE, self.norm.size)) for i in range(self.layers))

    @property
    def parts(self) -> Mapping[str, tuple[Block, str]]:
        return {"norm": (self.norm, "norm.")}


@dataclass(frozen=True)
class PerLayerInput(Block):
    """projection(activation(gate(x)) * what the layer is told), `size` numbers a token."""

    hidden: int
    size: int
    activation: Activation

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (hidden("hidden", self.hidden), Port("layer_input", (BATCH, SEQUENCE, self.size)))

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (hidden("mixed", self.hidden),)
