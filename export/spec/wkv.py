"""The two halves of an RWKV-4 layer (arXiv 2305.13048, modeling_rwkv.py), whose states do not grow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmexport.export.spec.axis import BATCH
from llmexport.export.spec.block import PRESENCE, Port, State, Use, state
from llmexport.export.spec.mixer import Mixer
from llmexport.export.spec.storage import Stored


@dataclass(frozen=True)
class TimeMix(Mixer):
    """output(sigmoid(receptance) * Wkv(key, value)): a decaying mean of values, whose sums are states in fp32. Decays
    are computed in fp32 from the numbers as they are stored.

    What is projected are mixtures of each token and the one before, of which the last is a state. `scale`, a power of
    two, multiplies what the last projection reads: of layers whose hidden states are kept smaller than the weights
    would make them, so that float16 holds them.
    """

    scale: float = 1.0

    @property
    def context(self) -> tuple[Port, ...]:
        return PRESENCE

    @property
    def states(self) -> tuple[State, ...]:
        sums: dict[str, Use] = {"numerator": "recurrence", "denominator": "weight_sum", "maximum": "recurrence"}
        shape = (BATCH, self.hidden)
        return (shift("time", self.hidden), *(state(n, shape, shape, "float32", use) for n, use in sums.items()))

    @property
    def stored(self) -> Mapping[str, Stored]:
        return {n: Stored("", (self.hidden,), "F") for n in ("time_decay", "time_first")}


@dataclass(frozen=True)
class ChannelMix(Mixer):
    """sigmoid(receptance) * value(relu(key) ** 2), of `intermediate` keys and of tokens mixed as TimeMix mixes them;
    `scale` is as there."""

    intermediate: int
    scale: float = 1.0

    @property
    def context(self) -> tuple[Port, ...]:
        return PRESENCE

    @property
    def states(self) -> tuple[State, ...]:
        return (shift("channel", self.hidden),)


def shift(name: str, hidden: int) -> State:
    """The last token of a step, normed."""
    return state(f"{name}_shift", (BATCH, 1, hidden), (BATCH, 1, hidden))
