"""CausalConv1d's kernel against float64, in chunks of tokens, with a state that may be updated in place.

Imports neither torch nor onnx: test_sanitizers.py runs it again under sanitizers.
"""

from __future__ import annotations

import numpy as np
import pytest
from kernel_numbers import Values, near, random, rounded, same, wide
from native import ORDERS
from pairwise import pairwise
from plugin_host import DTYPES, Machine, Run, computed, lay_out
from plugin_memory import Memory, Output

from llmexport.plugins.host import Refused


def tensors(size: tuple[int, int, int], taps: int, dtype: str, bias: bool = True) -> list[Values]:
    b, t, c = size
    shapes = [(b, t, c), (c, 1, taps), (b, taps - 1, c), (c,)]
    x, weight, state, its_bias = (random(shape, dtype, seed) for seed, shape in enumerate(shapes))
    # The last row ends at the last token, others before padding.
    end = (t - np.arange(b, dtype=np.int32)[::-1] % (t + 1)).astype(np.int32)
    return [x, weight, state, end, *[its_bias] * bias]


def exact(inputs: list[Values], dtype: str, activation: str) -> tuple[Values, Values]:
    """y in float64, its sum rounded, and the next state."""
    x, weight, state, end, *bias = wide(*inputs)
    seen, taps = np.concatenate((state, x), 1), weight.shape[-1]
    total = sum(seen[:, k : k + x.shape[1]] * weight[:, 0, k] for k in range(taps)) + (bias[0] if bias else 0)
    y = rounded(np.asarray(total), dtype)
    both = np.concatenate((inputs[2], inputs[0]), 1)
    next_state = np.stack([row[int(n) : int(n) + taps - 1] for row, n in zip(both, end, strict=True)])
    return (y / (1 + np.exp(-y)) if activation == "silu" else y), next_state


def right(found: list[Values], inputs: list[Values], dtype: str, activation: str) -> bool:
    y, next_state = exact(inputs, dtype, activation)
    rounded_alike = dtype == "fp32" or same(found[0], y) > 0.98
    same_state = found[1].tobytes() == next_state.tobytes()
    return near(found[0], y, dtype, roundings=2) and rounded_alike and same_state


# B, T, C: a token, fewer than the taps, about a chunk of 8 and its multiples; odd channels, whole vectors of 4
# and 8, more channels than a warp takes.
SIZES = [(1, 1, 5), (3, 2, 8), (2, 3, 37), (2, 7, 72), (1, 63, 40), (2, 64, 20), (1, 65, 264), (3, 130, 264)]


@pytest.mark.parametrize(("size", "dtype", "taps", "shift"), pairwise(SIZES, [*DTYPES], (2, 3, 4), (0, 1)))
def test_sizes(machine: Machine, size: tuple[int, int, int], dtype: str, taps: int, shift: int) -> None:
    inputs = tensors(size, taps, dtype)
    found = computed(machine.library.create("CausalConv1d", {"activation": "silu"}), machine.memory(), inputs, shift)
    assert right(found, inputs, dtype, "silu")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_and_activation(machine: Machine, dtype: str, activation: str, bias: bool) -> None:
    inputs = tensors((2, 9, 24), 4, dtype, bias)
    found = computed(machine.library.create("CausalConv1d", {"activation": activation}), machine.memory(), inputs)
    assert right(found, inputs, dtype, activation)


def in_place(machine: Machine, memory: Memory, inputs: list[Values]) -> Run:
    """A call whose state and next state are one tensor."""
    run = lay_out(machine.library.create("CausalConv1d", {"activation": "silu"}), memory, inputs)
    run.outputs[1] = Output.holding(memory, inputs[2])
    run.inputs[2] = run.outputs[1].address
    return run


@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 65])
def test_state_is_updated_in_place(machine: Machine, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    inputs = tensors((2, tokens, 40), 4, "bf16")
    for seed in ORDERS:
        monkeypatch.setenv("LLMEXPORT_EMULATOR_SEED", str(seed))
        memory = machine.memory()
        run = in_place(machine, memory, inputs)
        run.enqueue(memory.stream)
        assert right(run.results(), inputs, "bf16", "silu")


def test_without_tokens_the_state_goes_through(machine: Machine) -> None:
    inputs = tensors((2, 0, 40), 4, "bf16")
    y, state = computed(machine.library.create("CausalConv1d", {"activation": "silu"}), machine.memory(), inputs)
    assert y.shape == (2, 0, 40)
    assert state.tobytes() == inputs[2].tobytes()


def test_calls_in_a_row_are_one_call(machine: Machine) -> None:
    """A token, then fewer than the taps, then many: the state carries what a single call sees at once."""
    whole = tensors((2, 40, 24), 4, "fp16")
    whole[3][:] = 40
    plugin = machine.library.create("CausalConv1d", {"activation": "silu"})
    at_once = computed(plugin, machine.memory(), whole)
    state, parts = whole[2], []
    for part in np.split(whole[0], (1, 3, 4), axis=1):
        end = np.full(2, part.shape[1], np.int32)
        y, state = computed(plugin, machine.memory(), [part, whole[1], state, end, whole[4]])
        parts.append(y)
    assert np.concatenate(parts, 1).tobytes() == at_once[0].tobytes()
    assert state.tobytes() == at_once[1].tobytes()


@pytest.mark.parametrize(("given", "counts_as"), [(-7, 0), (2**31 - 1, 5), (-(2**31), 0), (6, 5)])
def test_an_end_outside_of_the_tokens_is_the_nearer_one_inside(machine: Machine, given: int, counts_as: int) -> None:
    inputs = tensors((1, 5, 40), 4, "bf16")
    plugin = machine.library.create("CausalConv1d", {"activation": "silu"})
    inputs[3][:] = given
    found = computed(plugin, machine.memory(), inputs)
    inputs[3][:] = counts_as
    assert right(found, inputs, "bf16", "silu")


@pytest.mark.parametrize(
    ("taps", "state", "says"),
    [
        (5, 4, "weight has K = 5 taps, the kernels are for 2 to 4"),
        (4, 4, "state has S = 4 inputs, but weight K = 4 taps, not S + 1"),
    ],
)
def test_refuses(machine: Machine, capfd: pytest.CaptureFixture[str], taps: int, state: int, says: str) -> None:
    inputs = [random(shape, "fp16", 1) for shape in ((1, 3, 8), (8, 1, taps), (1, state, 8))]
    inputs.append(np.array([3], np.int32))
    with pytest.raises(Refused):
        computed(machine.library.create("CausalConv1d", {"activation": "none"}), machine.memory(), inputs)
    assert f"llmexport: CausalConv1d: {says}" in capfd.readouterr().err
