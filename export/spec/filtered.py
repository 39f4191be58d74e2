"""Attention whose queries and keys see the last tokens filtered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmexport.export.errors import ExportError
from llmexport.export.spec.axis import BATCH
from llmexport.export.spec.block import PRESENCE, Block, Port, State, hidden, state
from llmexport.export.spec.mixer import Attention, Norm


@dataclass(frozen=True)
class LocalizedFilter(Block):
    """norm(x + conv(conv(x))) with two causal convolutions over two tokens each, to half the width and back (localized
    filtering, arXiv 2311.15786). Its states are the last token and what the first convolution made of it, both zero
    before the first token."""

    norm: Norm

    def __post_init__(self) -> None:
        if self.norm.size % 2:
            raise ExportError(f"localized filtering halves hidden_size, config.json makes it {self.norm.size}")

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (hidden("normed", self.norm.size), *PRESENCE, *(s.past for s in self.states))

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (hidden("filtered", self.norm.size), *(s.present for s in self.states))

    @property
    def states(self) -> tuple[State, ...]:
        shapes = {"filter_input": (BATCH, 1, self.norm.size), "filter_half": (BATCH, 1, self.norm.size // 2)}
        return tuple(state(name, shape, shape) for name, shape in shapes.items())

    @property
    def parts(self) -> Mapping[str, tuple[Block, str]]:
        return {"norm": (self.norm, "output_layernorm.")}


@dataclass(frozen=True)
class FilteredAttention(Attention):
    """Attention whose queries and keys are made of filtered hidden states, and its values of the hidden states (Yuan
    2.0). Each head takes its query and its key from the two projections one after the other, side by side: the first
    half of the heads has both from q_proj."""

    filter: LocalizedFilter | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.filter is None or self.fused or self.output_gate or self.heads != self.kv_heads:
            raise ValueError("filtered attention has a filter, as many keys as queries, and a matrix of each")

    @property
    def context(self) -> tuple[Port, ...]:
        return (*super().context, *PRESENCE)

    @property
    def states(self) -> tuple[State, ...]:
        return (*super().states, *(self.filter.states if self.filter else ()))

    @property
    def parts(self) -> Mapping[str, tuple[Block, str]]:
        return {**super().parts, **({"filter": (self.filter, "lf_gate.")} if self.filter else {})}
