"""Delta rules in float64, and what is right of their kernels. Imports neither torch nor onnx."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from kernel_numbers import Values, near, random, wide
from plugin_host import DTYPES, Machine, computed

from llmexport.plugins.host import Plugin
from llmexport.validate.compare import compare
from llmexport.validate.tolerance import Tolerance

FEW_TOKENS = 16  # up to here token by token
# The chunked form multiplies fp32 numbers as two bf16 parts, which leave out 2**-17 of each; a state is the sum of
# several such products. Measured on the emulator: 1.2e-5 of the largest, 7e-6 rms. A part left out gives 1e-3.
IN_CHUNKS = Tolerance(2.0**-15, 2.0**-16, scaled=True)
Q, K, V, G, BETA, STATE = range(6)
Inputs = list[Values]


def scale(inputs: Inputs) -> float:
    return float(inputs[Q].shape[-1] ** -0.5)


def exact(inputs: Inputs, l2_norm: bool = True) -> tuple[Values, Values]:
    """y and the next state, by decays [B, T, H] of a head's state, or [B, T, H, D] of its rows."""
    q, k, v, g, beta, state = wide(*inputs)
    if l2_norm:
        q, k = (x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    q, k = (x.repeat(v.shape[2] // x.shape[2], 2) for x in (q * scale(inputs), k))
    decay = np.exp(g).reshape(*g.shape, *(1,) * (5 - g.ndim))
    y = np.empty_like(v)
    for t in range(v.shape[1]):
        state = state * decay[:, t]
        error = (v[:, t] - np.einsum("bhd,bhdv->bhv", k[:, t], state)) * beta[:, t, :, None]
        state = state + k[:, t, :, :, None] * error[:, :, None]
        y[:, t] = np.einsum("bhd,bhdv->bhv", q[:, t], state)
    return y, state


def in_chunks(inputs: Inputs, shift: int = 0) -> bool:
    wide_enough = inputs[Q].shape[-1] in (64, 128) and inputs[Q].itemsize == 2
    return wide_enough and inputs[Q].shape[1] > FEW_TOKENS and shift == 0


def right_state(found: Values, state: Values, chunks: bool) -> bool:
    return compare(state, found).excess(IN_CHUNKS) <= 1 if chunks else near(found, state, "fp32")


@dataclass(frozen=True)
class DeltaRule:
    """The kernels of an op: decays are those of rows of the state or of all of a head's; `many` tokens fill chunks and
    leave a rest."""

    op: str
    of_rows: bool
    many: int

    def tensors(self, size: tuple[int, ...], dtype: str) -> Inputs:
        """Inputs of B, T, the heads of q and k if v can have more, H, D and V, as of a layer: decays of about a half,
        strengths between 0 and 1."""
        b, t, *few, h, d, v = size
        [groups] = few or [h if self.of_rows else 1]
        decays = (b, t, h, d) if self.of_rows else (b, t, h)
        shapes = [(b, t, groups, d), (b, t, groups, d), (b, t, h, v), decays, (b, t, h), (b, h, d, v)]
        q, k, values, g, beta, state = (random(s, "fp32", 1 + i) for i, s in enumerate(shapes))
        made = [q, k, values, -np.log1p(np.exp(g)), 1 / (1 + np.exp(-beta)), state]
        return [x.astype(DTYPES["fp32" if i in (G, STATE) else dtype]) for i, x in enumerate(made)]

    def created(self, machine: Machine, inputs: Inputs, l2_norm: bool = True) -> Plugin:
        return machine.library.create(self.op, {"scale": scale(inputs), "l2_norm": l2_norm})

    def run(self, machine: Machine, inputs: Inputs, l2_norm: bool = True, shift: int = 0) -> Inputs:
        return computed(self.created(machine, inputs, l2_norm), machine.memory(), inputs, shift)


GATED, KIMI = DeltaRule("GatedDeltaRule", of_rows=False, many=70), DeltaRule("KimiDeltaRule", of_rows=True, many=40)


def right(found: Inputs, inputs: Inputs, l2_norm: bool = True, shift: int = 0) -> bool:
    """y is rounded once, whatever the form."""
    y, state = exact(inputs, l2_norm)
    dtype = next(name for name, kind in DTYPES.items() if kind == inputs[V].dtype)
    return near(found[0], y, dtype) and right_state(found[1], state, in_chunks(inputs, shift))
