"""GatedRmsNorm's kernels against float64: rows by part of a warp, a warp, a block and in two passes.

Imports neither torch nor onnx: test_sanitizers.py runs it again under sanitizers.
"""

from __future__ import annotations

import numpy as np
import pytest
from kernel_numbers import Values, near, random, rounded, same, wide
from pairwise import pairwise
from plugin_host import DTYPES, Machine, computed

EPSILON = 1e-6
# T, H, D by the way a row is taken: alone, by part of a warp, a warp, a block, in two passes; rows that fill no block.
SIZES = [(1, 1, 1), (7, 3, 40), (63, 1, 64), (65, 2, 128), (130, 1, 100), (2, 3, 256), (1, 3, 520), (1, 2, 16640)]


def exact(inputs: list[Values], dtype: str, activation: str, early: bool) -> Values:
    x, gate, weight = wide(*inputs)
    normed = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + EPSILON)
    weighted = rounded(rounded(normed, dtype) * weight, dtype) if early else normed * weight
    with np.errstate(over="ignore"):
        return weighted * (gate if activation == "silu" else 1) / (1 + np.exp(-gate))


@pytest.mark.parametrize(
    ("size", "dtype", "activation", "early", "shift"),
    pairwise(SIZES, [*DTYPES], ("silu", "sigmoid"), (False, True), (0, 1)),
)
def test_sizes(
    machine: Machine, size: tuple[int, int, int], dtype: str, activation: str, early: bool, shift: int
) -> None:
    shape = (1, *size)
    inputs = [random(shape, dtype, 1), random(shape, dtype, 2) * 4, random(size[-1:], dtype, 3)]
    attributes = {"epsilon": EPSILON, "activation": activation, "round_before_weight": early}
    (y,) = computed(machine.library.create("GatedRmsNorm", attributes), machine.memory(), inputs, shift)
    wanted = exact(inputs, dtype, activation, early)
    assert near(y, wanted, dtype, roundings=3 if early else 1)
    assert dtype == "fp32" or same(y, wanted) > 0.98


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_at_the_ends_of_the_gates_range(machine: Machine, activation: str, dtype: str) -> None:
    most = float(np.finfo(np.float16).max) if dtype == "fp16" else 1e30
    gate = np.array([-most, -100, -0.0, 0.0, 100, np.nan]).reshape(1, 1, 6, 1).astype(DTYPES[dtype])
    x, weight = np.ones_like(gate), np.ones(1, DTYPES[dtype])
    attributes = {"epsilon": 0.0, "activation": activation, "round_before_weight": False}
    (y,) = computed(machine.library.create("GatedRmsNorm", attributes), machine.memory(), [x, gate, weight])
    values = y.astype(np.float64).ravel()
    assert np.abs(values[:2]).max() < 1e-6
    assert values[2:5].tolist() == ([0, 0, 100] if activation == "silu" else [0.5, 0.5, 1])
    assert np.isnan(values[5])


def test_no_tokens_are_no_error(machine: Machine) -> None:
    x, weight = np.zeros((2, 0, 3, 128), np.float16), np.ones(128, np.float16)
    attributes = {"epsilon": EPSILON, "activation": "silu", "round_before_weight": True}
    (y,) = computed(machine.library.create("GatedRmsNorm", attributes), machine.memory(), [x, x, weight])
    assert y.shape == x.shape


def test_a_row_of_zeros_gives_zeros(machine: Machine) -> None:
    x = np.zeros((1, 3, 2, 128), np.float16)
    gate, weight = random(x.shape, "fp16", 1), random((128,), "fp16", 2)
    attributes = {"epsilon": EPSILON, "activation": "silu", "round_before_weight": True}
    (y,) = computed(machine.library.create("GatedRmsNorm", attributes), machine.memory(), [x, gate, weight])
    assert not y.any()
