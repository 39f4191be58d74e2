"""Nodes of MoeExperts for the tests of its kernels: inputs, results in float64, and how near those must be.

Weights of experts that nobody chose are NaN. Imports no torch: test_sanitizers.py runs those tests under sanitizers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from kernel_numbers import UNIT, Values, rounded
from native import ORDERS
from plugin_host import DTYPES, Machine, computed

from llmexport.validate.compare import compare
from llmexport.validate.tolerance import Tolerance

ACTIVATIONS = ("silu", "gelu_tanh", "gelu_erf", "swiglu_clamped")
LAYOUTS = [{"transposed": t, "interleaved": i} for t, i in ((False, False), (False, True), (True, False), (True, True))]
MXFP4 = "mxfp4"
BLOCK = 32
# Formats: bits and numbers of a code, those of a scale, and what a code means 0 by.
FORMATS = {
    MXFP4: (4, "float4_e2m1fn", "float8_e8m0fnu", 0),
    "mxfp8": (8, "float8_e4m3fn", "float8_e8m0fnu", 0),
    "nvfp4": (4, "float4_e2m1fn", "float8_e4m3fn", 0),
    "fp8": (8, "float8_e4m3fn", "float32", 0),
    "uint4": (4, "uint8", "float32", 8),
    "uint8": (8, "uint8", "float32", 128),
    "int8": (8, "int8", "float32", 0),
}
# Where a sum in fp32 falls on the other side of a tie than in float64, a rounded product is off by one unit, and the
# result by less than one of its largest; an activation that does shows in a row of the result. In all 1 in 40.
# Measured: 0.55 units, and 0.12 in the mean.
MOST, RMS = 1.01, 0.2


@dataclass(frozen=True)
class Node:
    """Sizes and attributes of a node; `stored` is the type or format of its weights, empty if x's. `chosen`: only so
    many experts are chosen, of those from the second on; 0: all may be.
    """

    T: int
    K: int
    E: int
    C: int
    I: int  # noqa: E741
    B: int = 1
    activation: str = "silu"
    transposed: bool = False
    interleaved: bool = False
    scale_input: bool = False
    biases: bool = False
    stored: str = ""
    group: int = BLOCK
    factors: bool = False
    zeros: bool = False
    chosen: int = 0

    @property
    def attributes(self) -> dict[str, Any]:
        flags = {n: getattr(self, n) for n in ("transposed", "interleaved", "scale_input")}
        format, group = (self.stored, self.group) if self.stored in FORMATS else ("plain", 0)
        numbers = {"alpha": 1.702, "limit": 1.5}
        return {"activation": self.activation, **numbers, **flags, "format": format, "group": group}

    def inputs(self, dtype: str, seed: int = 0) -> list[Values]:
        random = np.random.default_rng(seed)

        def normal(*shape: int) -> Values:
            return random.standard_normal(shape)

        x, weights = normal(self.B, self.T, self.C), random.uniform(0.1, 1, (self.B, self.T, self.K))
        ranked = random.random((self.B, self.T, self.chosen or self.E)).argsort(-1)[..., : self.K]
        experts = ((ranked + 1) % self.E if self.chosen else ranked).astype(np.int32)
        shapes = [(self.E, 2 * self.I, self.C), (self.E, self.C, self.I)]
        x, weights = x.astype(DTYPES[dtype]), weights.astype(DTYPES[dtype])
        biases = [normal(self.E, n).astype(DTYPES[dtype]) for n in (2 * self.I, self.C)] if self.biases else []
        if self.stored in FORMATS:
            return [x, weights, experts, *self.packed(random, biases)]
        matrices = [(normal(*s) / math.sqrt(s[-1])).astype(DTYPES[self.stored or dtype]) for s in shapes]
        for matrix in matrices:
            matrix[[e for e in range(self.E) if e not in experts]] = np.nan
        if self.transposed:
            matrices = [np.ascontiguousarray(m.swapaxes(-1, -2)) for m in matrices]
        return [x, weights, experts, *matrices, *biases]

    def packed(self, random: np.random.Generator, biases: list[Values]) -> list[Values]:
        """Weights, finite, with all that comes after them."""
        bits, values, numbers, _ = FORMATS[self.stored]
        shapes = [(self.E, 2 * self.I, self.C), (self.E, self.C, self.I)]
        groups = [(e, n, -(-k // max(self.group, 1))) for e, n, k in shapes]
        codes = [random.integers(0, 256, (e, n, k * bits // 8), np.uint8) for e, n, k in shapes]
        if values == "float8_e4m3fn":
            for matrix in codes:
                matrix[matrix & 127 == 127] = 0
        if numbers == "float32":
            scales = [(random.uniform(0.5, 1, g) * 2.0**-bits).astype(np.float32) for g in groups]
        else:
            least, end = {MXFP4: (122, 126), "mxfp8": (118, 122), "nvfp4": (16, 40)}[self.stored]
            scales = [random.integers(least, end, g, np.uint8) for g in groups]
        factors = [random.uniform(0.5, 1, (self.E, n)).astype(np.float32) for n in (2, 1)]
        if not self.factors:
            factors = [np.ones_like(f) for f in factors] if self.zeros else []
        zeros = [random.integers(2**bits // 4, 2**bits * 3 // 4, g, np.uint8) for g in groups] if self.zeros else []
        return [*codes, *biases, *scales, *factors, *zeros]


def read_as(codes: Values, name: str) -> Values:
    return codes.view(getattr(ml_dtypes, name, None) or name).astype(np.float64)


def dequantised(node: Node, which: int, expert: list[Values]) -> Values:
    """Matrix 0 or 1 of an expert, whose inputs are all those of a node from gate_up on."""
    bits, values, numbers, zero = FORMATS[node.stored]
    codes, scales = expert[which], read_as(expert[4 + which], numbers)
    if bits == 4:
        codes = np.stack((codes & 15, codes >> 4), -1).reshape(len(codes), -1)
    at = np.arange(codes.shape[1]) // node.group
    wide = (read_as(codes, values) - (expert[8 + which][:, at] if node.zeros else zero)) * scales[:, at]
    if len(expert) <= 6:
        return wide
    own, row = expert[6 + which].astype(np.float64), np.arange(len(wide))
    return wide * own[row % len(own) if node.interleaved else row * len(own) // len(wide), None]


def activated(gate: Values, up: Values, attributes: dict[str, Any]) -> Values:
    name, alpha, limit = (attributes[n] for n in ("activation", "alpha", "limit"))
    if name == "silu":
        return gate / (1 + np.exp(-gate)) * up
    if name == "gelu_tanh":
        return 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up
    if name == "gelu_erf":
        return 0.5 * gate * (1 + np.vectorize(math.erf, otypes=[float])(gate / math.sqrt(2))) * up
    gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return gate / (1 + np.exp(-alpha * gate)) * (up + 1)


def exact(node: Node, inputs: list[Values], dtype: str) -> Values:
    """In float64, rounded to the dtype where the reference rounds but for the last time."""
    x, weights, experts, *matrices = inputs[:5]
    rows, scales = x.reshape(-1, node.C).astype(np.float64), weights.reshape(-1, node.K).astype(np.float64)
    y = np.zeros_like(rows)
    for e in np.unique(experts[(experts >= 0) & (experts < node.E)]):
        token, slot = np.nonzero(experts.reshape(-1, node.K) == e)
        if node.stored in FORMATS:
            expert = [t[e] for t in inputs[3:]]
            gate_up, down = (dequantised(node, which, expert) for which in range(2))
        else:
            gate_up, down = (m[e].astype(np.float64) for m in matrices)
        if not node.transposed:
            gate_up, down = gate_up.T, down.T
        scale = scales[token, slot, None]
        both = rounded((rounded(rows[token] * scale, dtype) if node.scale_input else rows[token]), dtype)
        both = rounded(both @ rounded(gate_up, dtype), dtype)
        if node.biases:
            both = rounded(both + inputs[5][e].astype(np.float64), dtype)
        gate, up = (both[:, 0::2], both[:, 1::2]) if node.interleaved else (both[:, : node.I], both[:, node.I :])
        out = rounded(rounded(activated(gate, up, node.attributes), dtype) @ rounded(down, dtype), dtype)
        if node.biases:
            out = rounded(out + inputs[6][e].astype(np.float64), dtype)
        np.add.at(y, token, out if node.scale_input else out * scale)
    return y.reshape(x.shape)


def run(machine: Machine, node: Node, inputs: list[Values], shift: int = 0) -> Values:
    return computed(machine.library.create("MoeExperts", node.attributes), machine.memory(), inputs, shift)[0]


def is_near(node: Node, found: Values, y: Values, dtype: str) -> bool:
    if dtype == "fp32":
        # n roundings of a sum of n products add up to sqrt(n) of them; those of the activation are a few.
        units = (math.sqrt(node.C) + math.sqrt(node.I)) / 2 + 2
        return compare(y, found).excess(Tolerance(units * UNIT[dtype], units * UNIT[dtype], scaled=True)) <= 1
    bound = Tolerance(MOST * UNIT[dtype], RMS * UNIT[dtype], scaled=True)
    return compare(rounded(y, dtype), found).excess(bound) <= 1


def is_right(machine: Machine, node: Node, dtype: str, shift: int = 0) -> bool:
    inputs = node.inputs(dtype)
    return is_near(node, run(machine, node, inputs, shift), exact(node, inputs, dtype), dtype)


def name(node: Node) -> str:
    sizes = "x".join(str(getattr(node, n)) for n in "TKECI")
    return sizes + "".join(
        f"-{k}{'' if v is True else v}" for k, v in vars(node).items() if k not in "TKECI" and v != getattr(Node, k)
    )


def is_right_where_some_are_no_expert(machine: Machine, node: Node, dtype: str) -> bool:
    """Below 0, above the last one, and none at all of the last token, which gets zeros."""
    inputs = node.inputs(dtype)
    inputs[2][0, ::2, 1], inputs[2][0, 1::3, 0] = -1, node.E
    inputs[2][0, -1] = 2**31 - 1
    y = run(machine, node, inputs)
    return is_near(node, y, exact(node, inputs, dtype), dtype) and not y[0, -1].any()


def tokens_with_nan(machine: Machine, node: Node, dtype: str, token: int) -> Values:
    """Of each number of the result, [T, C], whether it is NaN where one of a token's is."""
    inputs = node.inputs(dtype)
    inputs[0][0, token, 7] = np.nan
    return np.isnan(run(machine, node, inputs).astype(np.float32))[0]


def in_every_order(machine: Machine, node: Node, monkeypatch: pytest.MonkeyPatch) -> set[bytes]:
    """The results of threads and blocks in several orders."""
    results = set()
    for seed in ORDERS:
        monkeypatch.setenv("LLMEXPORT_EMULATOR_SEED", str(seed))
        results.add(run(machine, node, node.inputs("bf16")).tobytes())
    return results
