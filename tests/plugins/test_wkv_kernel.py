"""Wkv's kernel against float64, with padding, and with states that may be updated in place.

Imports neither torch nor onnx: test_sanitizers.py runs it again under sanitizers.
"""

from __future__ import annotations

import numpy as np
import pytest
from kernel_numbers import Values, near, random, wide
from pairwise import pairwise
from plugin_host import DTYPES, Machine, Run, computed, lay_out
from plugin_memory import Memory, Output

from llmexport.plugins.host import Plugin


def tensors(size: tuple[int, int, int], dtype: str) -> list[Values]:
    """Of a row in which all tokens are present, and of others, some of which begin and have padding on the left."""
    b, t, c = size
    key, value = 3 * random((b, t, c), dtype, 0), random((b, t, c), dtype, 1)
    present = (np.arange(t) >= 3 * np.arange(b)[:, None]).astype(DTYPES[dtype])
    time_decay, time_first = 3 * random((c,), "fp32", 2), random((c,), "fp32", 3)
    numerator, maximum = random((b, c), "fp32", 4), 5 * random((b, c), "fp32", 5)
    denominator = (1 + np.abs(random((b, c), "fp32", 6))) * (np.arange(b)[:, None] % 2 == 0)
    return [
        *(key.astype(DTYPES[dtype]), value, present, time_decay, time_first),
        *(x.astype(np.float32) for x in (numerator, denominator, maximum)),
    ]


def exact(inputs: list[Values]) -> tuple[Values, Values, Values]:
    """y, and the two sums that nothing divides, in float64."""
    key, value, present, time_decay, time_first, numerator, denominator, maximum = wide(*inputs)
    scale = np.where(denominator == 0, 0, np.exp(maximum))
    n, d, y = numerator * scale, denominator * scale, np.zeros_like(value)
    for t in range(key.shape[1]):
        bonus, weight = np.exp(time_first + key[:, t]), np.exp(key[:, t])
        y[:, t] = (n + bonus * value[:, t]) / (d + bonus)
        seen, kept = present[:, t, None] != 0, np.exp(-np.exp(time_decay))
        n, d = np.where(seen, kept * n + weight * value[:, t], n), np.where(seen, kept * d + weight, d)
    return y, n, d


# Each token rounds exponents of up to 20 to 2**-20, and of the tokens of a row those that still count add up.
EXPONENTS = 8 * 2.0**-20


def right(found: list[Values], inputs: list[Values], dtype: str) -> bool:
    y, n, d = exact(inputs)
    found_n, found_d, found_m = wide(*found[1:])
    sums = [(np.exp(found_m) * f, e) for f, e in ((found_n, n), (found_d, d))]
    same = all((np.abs(f - e) <= 1e-4 * np.abs(d)).all() for f, e in sums)
    if dtype == "fp32":
        return same and bool((np.abs(found[0] - y) <= EXPONENTS * np.abs(inputs[1]).max()).all())
    return same and near(found[0], y, dtype)


@pytest.fixture
def plugin(machine: Machine) -> Plugin:
    return machine.library.create("Wkv", {})


# B, T, C: a token, fewer than a thread has under way, about as many and their multiples; less than a warp of
# channels, more than one.
SIZES = [(1, 1, 5), (3, 7, 32), (2, 8, 37), (2, 9, 72), (1, 63, 40), (2, 64, 20), (1, 65, 64), (3, 130, 33)]


@pytest.mark.parametrize(("size", "dtype", "shift"), pairwise(SIZES, [*DTYPES], (0, 1)))
def test_sizes(machine: Machine, plugin: Plugin, size: tuple[int, int, int], dtype: str, shift: int) -> None:
    inputs = tensors(size, dtype)
    assert right(computed(plugin, machine.memory(), inputs, shift), inputs, dtype)


def in_place(plugin: Plugin, memory: Memory, inputs: list[Values]) -> Run:
    """A call whose states and next states are the same tensors."""
    run = lay_out(plugin, memory, inputs)
    for i in range(3):
        run.outputs[1 + i] = Output.holding(memory, inputs[5 + i])
        run.inputs[5 + i] = run.outputs[1 + i].address
    return run


@pytest.mark.parametrize("tokens", [1, 65])
def test_states_are_updated_in_place(machine: Machine, plugin: Plugin, tokens: int) -> None:
    inputs, memory = tensors((2, tokens, 40), "bf16"), machine.memory()
    run = in_place(plugin, memory, inputs)
    run.enqueue(memory.stream)
    assert right(run.results(), inputs, "bf16")


def test_without_tokens_the_states_go_through(machine: Machine, plugin: Plugin) -> None:
    inputs = tensors((1, 0, 40), "bf16")
    y, *states = computed(plugin, machine.memory(), inputs)
    assert y.shape == (1, 0, 40)
    assert [s.tobytes() for s in states] == [s.tobytes() for s in inputs[5:]]


def test_calls_in_a_row_are_one_call(machine: Machine, plugin: Plugin) -> None:
    *whole, numerator, denominator, maximum = tensors((2, 40, 24), "fp16")
    at_once = computed(plugin, machine.memory(), [*whole, numerator, denominator, maximum])
    states, parts = [numerator, denominator, maximum], []
    for part in zip(*(np.split(x, (1, 3, 4, 20), axis=1) for x in whole[:3]), strict=True):
        y, *states = computed(plugin, machine.memory(), [*part, *whole[3:], *states])
        parts.append(y)
    assert np.concatenate(parts, 1).tobytes() == at_once[0].tobytes()
    assert [s.tobytes() for s in states] == [s.tobytes() for s in at_once[1:]]


def test_keys_beyond_any_exponent_stay_finite(machine: Machine, plugin: Plugin) -> None:
    inputs = tensors((2, 20, 8), "fp32")
    inputs[0] += np.float32(300) * np.where(np.arange(20) % 7 < 4, 1, -1)[:, None].astype(np.float32)
    assert all(np.isfinite(x).all() for x in computed(plugin, machine.memory(), inputs))
