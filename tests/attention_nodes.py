"""Nodes of SinkAttention for the tests of its kernels: inputs, results in float64, and how near those must be.

Keys that no query may see are NaN. Imports no torch: test_sanitizers.py runs those tests under sanitizers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from kernel_numbers import UNIT, Values
from plugin_host import DTYPES, Machine, computed

from llmexport.validate.compare import compare
from llmexport.validate.tolerance import Tolerance

# Weights and result are rounded to 16 bits, each by a uniform error of 0.29 units of the least mantissa and 0.21 of
# the mean one: together 0.3.
HALF_RMS = 0.4
# In fp32 exp and the sums have some roundings each; those of a logit are of the size of its products.
FEW = 4.0


@dataclass(frozen=True)
class Shape:
    """Sizes of a node; `start` and `length` of each row of the batch, by default all S keys."""

    B: int
    H: int
    G: int
    T: int
    S: int
    D: int
    start: tuple[int, ...] = ()
    length: tuple[int, ...] = ()
    window: int = 0
    softcap: float = 0.0
    sinks: bool = True
    scale: float = 0.0  # 0: D ** -0.5

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.B, self.H, self.G, self.T, self.S, self.D

    @property
    def attributes(self) -> dict[str, Any]:
        return {"scale": self.scale or self.D**-0.5, "softcap": self.softcap, "window": self.window}

    def visible(self) -> Values:
        """[B, T, S]: whether a query sees a key."""
        starts, lengths = self.start or (0,) * self.B, self.length or (self.S,) * self.B
        position = np.array(lengths)[:, None, None] - self.T + np.arange(self.T)[:, None]
        key = np.arange(self.S)
        seen = (key >= np.array(starts)[:, None, None]) & (key <= position)
        return seen & (key > position - self.window) if self.window > 0 else seen

    def inputs(self, dtype: str, seed: int = 0) -> list[Values]:
        """q, k, v, start, length and sinks; keys and values that nobody sees are NaN."""
        random = np.random.default_rng(seed)
        q = random.standard_normal((self.B, self.H, self.T, self.D)).astype(DTYPES[dtype])
        shape = (self.B, self.G, self.S, self.D)
        k, v = (random.standard_normal(shape).astype(DTYPES[dtype]) for _ in range(2))
        unseen = ~self.visible().any(1)
        for cache in (k, v):
            np.moveaxis(cache, 2, 1)[unseen] = np.nan
        start = np.array(self.start or (0,) * self.B, np.int32)
        length = np.array(self.length or (self.S,) * self.B, np.int32)
        sinks = random.standard_normal(self.H).astype(DTYPES[dtype])
        return [q, k, v, start, length, *([sinks] if self.sinks else [])]


@dataclass(frozen=True)
class Exact:
    """The result [B, T, H, D] in float64; `mean` the largest weighted mean of the values' magnitudes, in which errors
    of weights count; `logit` the largest sum of magnitudes of a logit's products, or a sink's: its error is its
    weight's.
    """

    y: Values
    mean: float
    logit: float

    def near(self, found: Values, dtype: str) -> bool:
        if dtype == "fp32":
            units = FEW + self.logit
            bound = Tolerance(units * self.mean * UNIT[dtype], units / 2 * UNIT[dtype])
        else:
            # Half a unit of the result, and half a unit of what the weights add up.
            half = (float(np.abs(self.y).max()) + self.mean) / 2
            bound = Tolerance(half * UNIT[dtype], HALF_RMS * UNIT[dtype])
        return compare(self.y, found).excess(bound) <= 1


def attention(shape: Shape, inputs: list[Values]) -> Exact:
    q, k, v = (np.nan_to_num(x.astype(np.float64)) for x in inputs[:3])
    k, v = (x.repeat(shape.H // shape.G, axis=1) for x in (k, v))
    none = np.full(shape.H, -np.inf)
    sink = (inputs[5].astype(np.float64) if shape.sinks else none)[:, None, None]
    logits = q @ k.swapaxes(-1, -2) * shape.attributes["scale"]
    products = np.abs(q) @ np.abs(k).swapaxes(-1, -2) * shape.attributes["scale"]
    largest = max(float(np.abs(x[np.isfinite(x)]).max(initial=0)) for x in (products, sink))
    if shape.softcap > 0:
        logits = shape.softcap * np.tanh(logits / shape.softcap)
    logits = np.where(shape.visible()[:, None], logits, -np.inf)
    most = np.maximum(logits.max(-1, keepdims=True, initial=-np.inf), sink)
    most = np.where(np.isfinite(most), most, 0.0)
    weights = np.exp(logits - most)
    total = weights.sum(-1, keepdims=True) + np.exp(sink - most)
    weights /= np.where(total == 0, 1.0, total)
    return Exact((weights @ v).swapaxes(1, 2), float((weights @ np.abs(v)).max(initial=0)), largest)


def run(machine: Machine, shape: Shape, inputs: list[Values], shift: int = 0) -> Values:
    plugin = machine.library.create("SinkAttention", shape.attributes)
    return computed(plugin, machine.memory(), inputs, shift)[0]


def near(machine: Machine, shape: Shape, dtype: str, shift: int = 0) -> bool:
    inputs = shape.inputs(dtype)
    return attention(shape, inputs).near(run(machine, shape, inputs, shift), dtype)


def name(shape: Shape) -> str:
    changed = [
        f"{k}{v}".replace(" ", "") for k, v in vars(shape).items() if k not in "BHGTSD" and v != getattr(Shape, k, ())
    ]
    return "x".join(map(str, shape.sizes)) + "".join(f"-{c}" for c in changed)
