"""The gated delta net, and its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from llmexport.export.errors import ExportError
from llmexport.export.spec.axis import BATCH, SEQUENCE
from llmexport.export.spec.block import PRESENCE, TOKENS_END, Block, Port, State, hidden, state
from llmexport.export.spec.mixer import Mixer


@dataclass(frozen=True)
class CausalConv(Block):
    """Depthwise causal convolution over `kernel` tokens, then SiLU; its state is the last kernel - 1 inputs before the
    padding behind a row's tokens."""

    channels: int
    kernel: int

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (hidden("mixed", self.channels), TOKENS_END, *(s.past for s in self.states))

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (hidden("convolved", self.channels), *(s.present for s in self.states))

    @property
    def states(self) -> tuple[State, ...]:
        shape = (BATCH, self.kernel - 1, self.channels)
        return (state("conv_state", shape, shape),)


@dataclass(frozen=True)
class GatedNorm(Block):
    """RMSNorm of every head times the activation of a gate (modeling_qwen3_5_moe.py, RMSNormGated). `rounding`: as a
    Norm's."""

    heads: int
    size: int
    epsilon: float
    activation: Literal["silu", "sigmoid"] = "silu"
    rounding: Literal["before_weight", "after_weight"] = "before_weight"

    @property
    def inputs(self) -> tuple[Port, ...]:
        shape = (BATCH, SEQUENCE, self.heads, self.size)
        return (Port("recalled", shape), Port("gate", shape))

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (Port("normed", (BATCH, SEQUENCE, self.heads, self.size)),)


@dataclass(frozen=True)
class GatedDeltaNet(Mixer):
    """Linear attention by the gated delta rule behind a short convolution (arXiv 2412.06464).

    q and k have `key_heads` of `key_size`, v `value_heads` of `value_size`; the recurrent state is fp32. `grouped`: one
    matrix holds, key head by key head, q, k, v and the gate, and another beta and the decay (modeling_qwen3_next.py).
    """

    key_heads: int
    key_size: int
    value_heads: int
    value_size: int
    kernel: int
    epsilon: float
    grouped: bool = False

    def __post_init__(self) -> None:
        if self.value_heads % self.key_heads:
            raise ExportError(f"{self.value_heads} value heads are not a multiple of {self.key_heads} key heads")

    @property
    def convolution(self) -> CausalConv:
        return CausalConv(2 * self.key_heads * self.key_size + self.value_heads * self.value_size, self.kernel)

    @property
    def norm(self) -> GatedNorm:
        return GatedNorm(self.value_heads, self.value_size, self.epsilon)

    @property
    def context(self) -> tuple[Port, ...]:
        return PRESENCE

    @property
    def states(self) -> tuple[State, ...]:
        shape = (BATCH, self.value_heads, self.key_size, self.value_size)
        return (*self.convolution.states, state("recurrent_state", shape, shape, "float32", "recurrence"))

    @property
    def parts(self) -> Mapping[str, tuple[Block, str]]:
        return {"convolution": (self.convolution, "conv1d."), "norm": (self.norm, "norm.")}
