"""The two halves of an RWKV-7 layer (arXiv 2503.14456), whose states do not grow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmexport.export.spec.axis import BATCH, SEQUENCE
from llmexport.export.spec.block import PRESENCE, Port, State, hidden, state
from llmexport.export.spec.mixer import Mixer
from llmexport.export.spec.storage import Stored
from llmexport.export.spec.wkv import shift


@dataclass(frozen=True)
class DeltaTimeMix(Mixer):
    """output((norm(Wkv7) + bonus) * gate): a generalised delta rule over heads of `size`, whose state is fp32.

    What is projected are mixtures of each token and the one before, of which the last is a state. Decays, rates of
    removal and the gate are made through few numbers a token, as many as their ranks. Values are mixed with those of
    the `first` such layer, which lends them, through `value_rank` numbers. `epsilon` is that of the norm of each head.
    """

    size: int
    decay_rank: int
    rate_rank: int
    value_rank: int
    gate_rank: int
    epsilon: float
    first: bool = False

    @property
    def heads(self) -> int:
        return self.hidden // self.size

    @property
    def context(self) -> tuple[Port, ...]:
        return PRESENCE if self.first else (*PRESENCE, self._first_value)

    @property
    def lent(self) -> tuple[Port, ...]:
        """What later layers read of this one."""
        return (self._first_value,) if self.first else ()

    @property
    def outputs(self) -> tuple[Port, ...]:
        attended, *presents = super().outputs
        return (attended, *self.lent, *presents)

    @property
    def states(self) -> tuple[State, ...]:
        shape = (BATCH, self.heads, self.size, self.size)
        return (shift("time", self.hidden), state("recurrent_state", shape, shape, "float32", "recurrence"))

    @property
    def stored(self) -> Mapping[str, Stored]:
        """Where mixtures and decays of published models are about."""
        mixed = Stored("", (1, 1, self.hidden), usual=(0.0, 1.0))
        return {f"x_{n}": mixed for n in "rwkvag"} | {"w_lora.lora.2.bias": Stored("", (self.hidden,), usual=(-6, 1))}

    @property
    def spare(self) -> tuple[str, ...]:
        """What would mix the first layer's values with themselves."""
        parts = ("lora.0.weight", "lora.2.weight", "lora.2.bias")
        return tuple(f"v_lora.{n}" for n in parts) if self.first else ()

    @property
    def _first_value(self) -> Port:
        return hidden("first_value", self.hidden, (BATCH, SEQUENCE))


@dataclass(frozen=True)
class ShiftedMlp(Mixer):
    """value(relu(key) ** 2), of `intermediate` keys and of tokens mixed as DeltaTimeMix mixes them."""

    intermediate: int

    @property
    def context(self) -> tuple[Port, ...]:
        return PRESENCE

    @property
    def states(self) -> tuple[State, ...]:
        return (shift("channel", self.hidden),)

    @property
    def stored(self) -> Mapping[str, Stored]:
        return {"x_k": Stored("", (self.hidden,), usual=(0.0, 1.0))}
