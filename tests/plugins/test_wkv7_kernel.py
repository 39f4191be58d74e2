"""Wkv7's kernel against float64, with padding, and with a state that may be updated in place.

Imports neither torch nor onnx: test_sanitizers.py runs it again under sanitizers.
"""

from __future__ import annotations

import numpy as np
import pytest
from kernel_numbers import Values, near, random, wide
from pairwise import pairwise
from plugin_host import DTYPES, Machine, computed, lay_out
from plugin_memory import Output

from llmexport.plugins.host import Plugin

Size = tuple[int, int, int, int, int]
# Of y and a state of order one: a sum of D products in fp32, and what a removal leaves of those before.
CLOSE = 1e-5


def tensors(size: Size, dtype: str) -> list[Values]:
    """Of a row in which all tokens are present, and of others, which have padding on the left."""
    b, t, h, d, v = size
    of_keys = (b, t, h, d)
    r, w, k, kappa, a = (random(of_keys, "fp32", i) for i in range(5))
    present = np.arange(t) >= 3 * np.arange(b)[:, None]
    kappa /= np.linalg.norm(kappa, axis=-1, keepdims=True)
    made = (r, 3 * w, k / d**0.5, random((b, t, h, v), "fp32", 5), kappa, 1 / (1 + np.exp(-a)), present)
    return [*(x.astype(DTYPES[dtype]) for x in made), random((b, h, v, d), "fp32", 6)]


def exact(inputs: list[Values]) -> tuple[Values, Values]:
    r, w, k, v, kappa, a, present, state = wide(*inputs)
    y, s = np.zeros_like(v), state.copy()
    decay = np.exp(-np.exp(-0.5) / (1 + np.exp(-w)))
    for t in range(v.shape[1]):
        known = np.einsum("bhvd,bhd->bhv", s, kappa[:, t])
        removed = known[..., None] * (a * kappa)[:, t, :, None]
        after = s * decay[:, t, :, None] - removed + v[:, t, ..., None] * k[:, t, :, None]
        s = np.where(present[:, t, None, None, None] != 0, after, s)
        y[:, t] = np.einsum("bhvd,bhd->bhv", s, r[:, t])
    return y, s


def right(found: list[Values], inputs: list[Values], dtype: str) -> bool:
    y, state = exact(inputs)
    close = bool((np.abs(found[1] - state) <= CLOSE * np.abs(state).max(initial=1)).all())
    if dtype == "fp32":
        return close and bool((np.abs(found[0] - y) <= CLOSE * np.abs(y).max(initial=1)).all())
    return close and near(found[0], y, dtype)


@pytest.fixture
def plugin(machine: Machine) -> Plugin:
    return machine.library.create("Wkv7", {})


# B, T, H, D, V: no token and one, fewer than a thread has under way, about as many and their multiples; rows that fill
# no block, one block, more than one.
SIZES: list[Size] = [(1, 1, 1, 16, 5), (3, 3, 2, 64, 16), (2, 4, 1, 128, 33), (1, 5, 3, 32, 20), (1, 63, 1, 64, 64)]
SIZES += [(2, 8, 2, 16, 16), (1, 9, 1, 128, 128), (1, 130, 1, 32, 17), (2, 0, 1, 64, 24)]


@pytest.mark.parametrize(("size", "dtype", "shift"), pairwise(SIZES, [*DTYPES], (0, 1)))
def test_sizes(machine: Machine, plugin: Plugin, size: Size, dtype: str, shift: int) -> None:
    inputs = tensors(size, dtype)
    assert right(computed(plugin, machine.memory(), inputs, shift), inputs, dtype)


@pytest.mark.parametrize("tokens", [1, 9])
def test_the_state_is_updated_in_place(machine: Machine, plugin: Plugin, tokens: int) -> None:
    inputs, memory = tensors((2, tokens, 2, 64, 24), "bf16"), machine.memory()
    run = lay_out(plugin, memory, inputs)
    run.outputs[1] = Output.holding(memory, inputs[7])
    run.inputs[7] = run.outputs[1].address
    run.enqueue(memory.stream)
    assert right(run.results(), inputs, "bf16")


def test_calls_in_a_row_are_one_call(machine: Machine, plugin: Plugin) -> None:
    *whole, state = tensors((2, 40, 2, 16, 16), "fp16")
    at_once = computed(plugin, machine.memory(), [*whole, state])
    parts = []
    for part in zip(*(np.split(x, (1, 3, 4, 20), axis=1) for x in whole), strict=True):
        y, state = computed(plugin, machine.memory(), [*part, state])
        parts.append(y)
    assert np.concatenate(parts, 1).tobytes() == at_once[0].tobytes()
    assert state.tobytes() == at_once[1].tobytes()


def test_what_stands_in_padding_reaches_no_state(machine: Machine, plugin: Plugin) -> None:
    inputs = tensors((2, 9, 1, 32, 16), "fp32")
    expected = exact(inputs)[1]
    for x in inputs[:6]:
        x[1, :3] = np.nan
    y, state = computed(plugin, machine.memory(), inputs)
    assert (np.abs(state - expected) <= CLOSE * np.abs(expected).max(initial=1)).all()
    assert np.isfinite(y[1, 3:]).all()
