"""Every kernel against float64: dtypes, odd sizes, misaligned views, any order of a block's threads.

Imports neither torch nor onnx: test_sanitizers.py runs it and every test_*_kernel.py again under sanitizers.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from kernel_numbers import Values, near, random, rounded, same
from native import ORDERS
from pairwise import pairwise
from plugin_host import DTYPES, Machine, computed


def rope(x: Values, cos: Values, sin: Values, interleaved: bool) -> Values:
    wide, c, s = (v.astype(np.float64) for v in (x, cos[:, None], sin[:, None]))
    r = cos.shape[-1]
    first, second = (slice(0, 2 * r, 2), slice(1, 2 * r, 2)) if interleaved else (slice(0, r), slice(r, 2 * r))
    y = wide.copy()
    y[..., first] = wide[..., first] * c - wide[..., second] * s
    y[..., second] = wide[..., second] * c + wide[..., first] * s
    return y


def add_rms_norm(x: Values, residual: Values, weight: Values, offset: float, early: bool) -> tuple[Values, Values]:
    total = (x.astype(np.float64) + residual.astype(np.float64)).astype(x.dtype)
    wide = total.astype(np.float64)
    normed = wide / np.sqrt(np.mean(wide**2, -1, keepdims=True) + 1e-5)
    scale = weight.astype(np.float64) + offset
    if early:
        normed, scale = (v.astype(x.dtype).astype(np.float64) for v in (normed, scale))
    return normed * scale, total


def gated_act(gate: Values, up: Values, activation: str, alpha: float, limit: float) -> Values:
    g, u = gate.astype(np.float64), up.astype(np.float64)
    if activation == "silu":
        return g / (1 + np.exp(-g)) * u
    if activation == "gelu_tanh":
        return 0.5 * g * (1 + np.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) * u
    if activation == "gelu_erf":
        return 0.5 * g * (1 + np.vectorize(math.erf)(g / math.sqrt(2))) * u
    g, u = np.minimum(g, limit), np.clip(u, -limit, limit)
    return g / (1 + np.exp(-alpha * g)) * (u + 1)


# B, H, T, D, R: one pair, odd sizes, whole vectors, heads and tokens that fill no block; patches of one row, and tiles.
ROPE_SIZES = [(1, 1, 1, 2, 1), (2, 3, 63, 10, 5), (1, 2, 130, 7, 2), (2, 5, 63, 128, 64), (1, 9, 130, 64, 16)]
ROPE_SIZES += [(1, 3, 34, 72, 36), (2, 2, 10, 88, 44)]


@pytest.mark.parametrize(
    ("size", "dtype", "interleaved", "shift"), pairwise(ROPE_SIZES, [*DTYPES], (False, True), (0, 1))
)
def test_rope(machine: Machine, size: tuple[int, ...], dtype: str, interleaved: bool, shift: int) -> None:
    b, h, t, d, r = size
    inputs = [random((b, h, t, d), dtype, 1), random((b, t, r), dtype, 2), random((b, t, r), dtype, 3)]
    (y,) = computed(machine.library.create("Rope", {"interleaved": interleaved}), machine.memory(), inputs, shift)
    assert near(y, rope(*inputs, interleaved), dtype)
    assert (y[..., 2 * r :] == inputs[0][..., 2 * r :]).all()


# B, T, C by the way a row is taken: alone, by part of a warp, a warp, a block, in two passes.
NORM_SIZES = [
    (1, 1, 1),
    (2, 63, 37),
    (1, 130, 128),
    (1, 63, 264),
    (3, 1, 1024),
    (1, 2, 2880),
    (1, 2, 8192),
    (1, 1, 16640),
]


@pytest.mark.parametrize(("size", "dtype", "early", "shift"), pairwise(NORM_SIZES, [*DTYPES], (False, True), (0, 1)))
def test_add_rms_norm(machine: Machine, size: tuple[int, ...], dtype: str, early: bool, shift: int) -> None:
    inputs = [random(size, dtype, 1), random(size, dtype, 2), random(size[-1:], dtype, 3)]
    attributes = {"epsilon": 1e-5, "weight_offset": 1.0, "round_before_weight": early}
    y, total = computed(machine.library.create("AddRmsNorm", attributes), machine.memory(), inputs, shift)
    exact, exact_total = add_rms_norm(*inputs, 1.0, early)
    assert near(y, exact, dtype)
    assert (total == exact_total).all()


@pytest.mark.parametrize(("size", "dtype", "early", "shift"), pairwise(NORM_SIZES, [*DTYPES], (False, True), (0, 1)))
def test_add_rms_norm_of_a_normed_summand(
    machine: Machine, size: tuple[int, ...], dtype: str, early: bool, shift: int
) -> None:
    """The summand is rounded where its own norm ends. y is that of the sum that there is."""
    x, residual, weight, inner = (random(s, dtype, i) for i, s in enumerate((size, size, size[-1:], size[-1:])))
    attributes = {"epsilon": 1e-5, "weight_offset": 1.0, "round_before_weight": early}
    plugin = machine.library.create("AddRmsNorm", attributes)
    y, total = computed(plugin, machine.memory(), [8 * x, residual, weight, inner], shift)
    zeros = np.zeros_like(x)
    summand = rounded(add_rms_norm(8 * x, zeros, inner, 1.0, early)[0], dtype)
    assert near(total, summand + residual, dtype, roundings=2)
    assert dtype == "fp32" or same(total, summand + residual) > 0.99
    assert near(y, add_rms_norm(total, zeros, weight, 1.0, early)[0], dtype)


ACT_SIZES = [(1, 1, 1), (2, 63, 37), (1, 130, 72), (1, 1, 4097)]
ACTIVATIONS = {"silu": (0.0, 0.0), "gelu_tanh": (0.0, 0.0), "gelu_erf": (0.0, 0.0), "swiglu_clamped": (1.702, 0.7)}


@pytest.mark.parametrize(
    ("size", "dtype", "activation", "shift"), pairwise(ACT_SIZES, [*DTYPES], [*ACTIVATIONS], (0, 1))
)
def test_gated_act(machine: Machine, size: tuple[int, ...], dtype: str, activation: str, shift: int) -> None:
    alpha, limit = ACTIVATIONS[activation]
    inputs = [random(size, dtype, 1) * 4, random(size, dtype, 2)]
    attributes = {"activation": activation, "alpha": alpha, "limit": limit}
    (y,) = computed(machine.library.create("GatedAct", attributes), machine.memory(), inputs, shift)
    assert near(y, gated_act(*inputs, activation, alpha, limit), dtype)


# Rows that fill no vector, a warp, a block, and two blocks of unequal length.
HALVES_SIZES = [(1, 1, 1), (2, 63, 37), (1, 130, 72), (2, 3, 1032), (1, 2, 4104)]


@pytest.mark.parametrize(
    ("size", "dtype", "activation", "shift"), pairwise(HALVES_SIZES, [*DTYPES], [*ACTIVATIONS], (0, 1))
)
def test_gated_act_of_halves(machine: Machine, size: tuple[int, ...], dtype: str, activation: str, shift: int) -> None:
    alpha, limit = ACTIVATIONS[activation]
    gate, up = random(size, dtype, 1) * 4, random(size, dtype, 2)
    attributes = {"activation": activation, "alpha": alpha, "limit": limit}
    plugin = machine.library.create("GatedAct", attributes)
    (y,) = computed(plugin, machine.memory(), [np.concatenate((gate, up), -1)], shift)
    assert y.shape == size
    assert near(y, gated_act(gate, up, activation, alpha, limit), dtype)
    assert (y == computed(plugin, machine.memory(), [gate, up], shift)[0]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_act_at_the_ends_of_its_range(machine: Machine, activation: str, dtype: str) -> None:
    most = float(np.finfo(DTYPES["fp16"]).max) if dtype == "fp16" else 1e30
    gate = np.array([[[-most, -100, -0.0, 0.0, 100, np.nan, 1.0]]]).astype(DTYPES[dtype])
    up = np.array([[[0.5, 0.5, 1.0, 1.0, 0.5, 1.0, np.nan]]]).astype(DTYPES[dtype])
    attributes = {"activation": activation, "alpha": 1.0, "limit": 50.0}
    (y,) = computed(machine.library.create("GatedAct", attributes), machine.memory(), [gate, up])
    values = y.astype(np.float64).ravel()
    assert np.isnan(values[5:]).all()
    assert np.abs(values[:4]).max() < 1e-6
    assert values[4] == (75 if activation == "swiglu_clamped" else 50)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("weights", [1, 2])
def test_result_does_not_depend_on_the_order_of_threads(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, weights: int, shift: int
) -> None:
    inputs = [random((1, 3, 1160), "bf16", i) for i in (1, 2)] + [random((1160,), "bf16", 3)] * weights
    attributes = {"epsilon": 1e-5, "weight_offset": 0.0, "round_before_weight": True}
    plugin = machine.library.create("AddRmsNorm", attributes)
    results = []
    for seed in ORDERS:
        monkeypatch.setenv("LLMEXPORT_EMULATOR_SEED", str(seed))
        results.append(b"".join(y.tobytes() for y in computed(plugin, machine.memory(), inputs, shift)))
    assert len(set(results)) == 1


def test_empty_tensor_is_no_error(machine: Machine) -> None:
    nothing = random((2, 0, 64), "fp16", 1)
    plugin = machine.library.create("GatedAct", {"activation": "silu", "alpha": 0.0, "limit": 0.0})
    assert computed(plugin, machine.memory(), [nothing, nothing])[0].shape == (2, 0, 64)
