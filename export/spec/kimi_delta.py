"""Kimi Delta Attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmexport.export.spec.axis import BATCH
from llmexport.export.spec.block import PRESENCE, Block, Port, State, state
from llmexport.export.spec.delta import GatedNorm
from llmexport.export.spec.mixer import Mixer
from llmexport.export.spec.storage import Stored


@dataclass(frozen=True)
class KimiDeltaAttention(Mixer):
    """Linear attention by a delta rule whose state decays channel by channel, behind short convolutions (KDA, arXiv
    2510.26692). q, k and v have `heads` of `size`; the recurrent state is fp32.

    Decays and the gate of the output are made through `size` numbers a token (modeling_kimi_linear.py).
    """

    heads: int
    size: int
    kernel: int
    epsilon: float

    @property
    def width(self) -> int:
        return self.heads * self.size

    @property
    def norm(self) -> GatedNorm:
        return GatedNorm(self.heads, self.size, self.epsilon, activation="sigmoid", rounding="after_weight")

    @property
    def context(self) -> tuple[Port, ...]:
        return PRESENCE

    @property
    def states(self) -> tuple[State, ...]:
        seen = (BATCH, self.kernel - 1, 3 * self.width)
        shape = (BATCH, self.heads, self.size, self.size)
        recurrent = state("recurrent_state", shape, shape, "float32", "recurrence")
        return (state("conv_state", seen, seen), recurrent)

    @property
    def parts(self) -> Mapping[str, tuple[Block, str]]:
        return {"norm": (self.norm, "o_norm.")}

    @property
    def stored(self) -> Mapping[str, Stored]:
        return {"A_log": Stored("", (1, 1, self.heads, 1), "F"), "dt_bias": Stored("", (self.width,), "F")}
