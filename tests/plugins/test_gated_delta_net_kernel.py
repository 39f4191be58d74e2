"""GatedDeltaNet's kernels against float64: one for a token a row, and several one after another.

Imports neither torch nor onnx: test_sanitizers.py runs it again under sanitizers.
"""

from __future__ import annotations

import numpy as np
import pytest
from delta_rules import exact as rule
from delta_rules import right_state
from kernel_numbers import Values, near, random, rounded, wide
from native import ORDERS
from pairwise import pairwise
from plugin_host import DTYPES, Machine, computed, lay_out
from plugin_memory import Output

from llmexport.plugins.host import Plugin, Refused

EPSILON = 1e-6
MIXED, TAPS, CONV_STATE, END, A, B, PRESENT, A_LOG, DT_BIAS, Z, WEIGHT, STATE = range(12)
Inputs = list[Values]
# B, T, G, H, D, V. One token in one kernel: slices of a head of less than a warp's columns, of one, of more; two heads
# of v for one of q and k; a channel for each thread, for some, and for each more than one. Several kernels: more heads
# than the emulator's SMs take at once, few tokens, chunks.
ALONE = [
    (1, 1, 1, 2, 16, 16),
    (2, 1, 2, 2, 32, 32),
    (1, 1, 1, 3, 64, 64),
    (2, 1, 2, 4, 128, 128),
    (1, 1, 4, 8, 16, 128),
]
ALONE += [(3, 1, 1, 2, 128, 16)]
IN_TURN = [(3, 1, 2, 4, 32, 64), (2, 7, 2, 4, 16, 32), (1, 65, 1, 1, 16, 16), (1, 16, 1, 3, 128, 64)]
CHUNKS = [(2, 17, 1, 2, 64, 16), (1, 65, 2, 4, 64, 32), (1, 130, 1, 2, 128, 128)]


def tensors(size: tuple[int, ...], dtype: str, taps: int = 4) -> Inputs:
    """As of a layer; every fifth token is padding, the first of a row of one token where there are others. The last
    row ends at the last token, others before padding."""
    b, t, groups, h, d, v = size
    channels = 2 * groups * d + h * v
    shapes = [
        (b, t, channels),
        (channels, 1, taps),
        (b, taps - 1, channels),
        (b,),
        (b, t, h),
        (b, t, h),
        (b, t),
        (h,),
        (h,),
        (b, t, h, v),
        (v,),
        (b, h, d, v),
    ]
    made = [random(shape, "fp32" if i == STATE else dtype, i) for i, shape in enumerate(shapes)]
    made[END] = (t - np.arange(b, dtype=np.int32)[::-1] % (t + 1)).astype(np.int32)
    made[PRESENT][:] = (np.arange(b * t) % 5 > 0).reshape(b, t) if b * t > 1 else 1
    return made


def convolved(machine: Machine, inputs: Inputs, dtype: str) -> Values:
    """q, k and v: of fp32 in float64; of 16 bits, where a value of the other side of a tie is another, as the kernel of
    CausalConv1d gives it, which test_causal_conv1d_kernel.py holds against float64."""
    if dtype != "fp32":
        plugin = machine.library.create("CausalConv1d", {"activation": "silu"})
        return computed(plugin, machine.memory(), inputs[: END + 1])[0].astype(np.float64)
    mixed, weight, state = wide(*inputs[:END])
    seen = np.concatenate((state, mixed), 1)
    total = sum(seen[:, k : k + mixed.shape[1]] * weight[:, 0, k] for k in range(weight.shape[-1]))
    return np.asarray(total / (1 + np.exp(-total)))


def last_seen(inputs: Inputs) -> Values:
    """The inputs before each row's end."""
    both, kept = np.concatenate((inputs[CONV_STATE], inputs[MIXED]), 1), inputs[CONV_STATE].shape[1]
    return np.stack([row[n : n + kept] for row, n in zip(both, inputs[END], strict=True)])


def exact(machine: Machine, inputs: Inputs, dtype: str, activation: str, early: bool) -> tuple[Values, Values]:
    """gated and the next state in float64, rounded where the op says."""
    a, b, present, a_log, dt_bias, z, weight, state = wide(*inputs[A:])
    mixed = convolved(machine, inputs, dtype)
    heads, size, width = state.shape[1:]
    keys = (mixed.shape[-1] - heads * width) // 2
    q, k, v = np.split(mixed, (keys, 2 * keys), -1)
    q, k, v = (x.reshape(*x.shape[:2], -1, n) for x, n in ((q, size), (k, size), (v, width)))
    g = -np.exp(a_log) * np.logaddexp(a + dt_bias, 0) * present[..., None]
    beta = rounded(1 / (1 + np.exp(-b)), dtype) * present[..., None]
    y, state = rule([q, k, v, g, beta, state])
    y = rounded(y, dtype)
    normed = y / np.sqrt((y**2).mean(-1, keepdims=True) + EPSILON)
    weighted = rounded(rounded(normed, dtype) * weight, dtype) if early else normed * weight
    return weighted * (z if activation == "silu" else 1) / (1 + np.exp(-z)), state


def created(machine: Machine, size: int, activation: str = "silu", early: bool = True) -> Plugin:
    norm = {"epsilon": EPSILON, "activation": activation, "round_before_weight": early}
    return machine.library.create("GatedDeltaNet", {"scale": size**-0.5, "l2_norm": True, **norm})


def right(
    machine: Machine, found: Inputs, inputs: Inputs, dtype: str, activation: str = "silu", early: bool = True
) -> bool:
    gated, state = exact(machine, inputs, dtype, activation, early)
    chunks = state.shape[2] in (64, 128) and dtype != "fp32" and inputs[MIXED].shape[1] > 16
    same = found[1].tobytes() == last_seen(inputs).tobytes()
    return same and near(found[0], gated, dtype, roundings=2 + early) and right_state(found[2], state, chunks)


@pytest.mark.parametrize(
    ("size", "dtype", "activation", "early", "shift", "taps"),
    pairwise([*ALONE, *IN_TURN], [*DTYPES], ("silu", "sigmoid"), (False, True), (0, 1), (4, 3, 2)),
)
def test_sizes(
    machine: Machine, size: tuple[int, ...], dtype: str, activation: str, early: bool, shift: int, taps: int
) -> None:
    inputs = tensors(size, dtype, taps)
    found = computed(created(machine, size[4], activation, early), machine.memory(), inputs, shift)
    assert right(machine, found, inputs, dtype, activation, early)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("size", CHUNKS, ids=str)
def test_chunks(machine: Machine, size: tuple[int, ...], dtype: str) -> None:
    inputs = tensors(size, dtype)
    assert right(machine, computed(created(machine, size[4]), machine.memory(), inputs), inputs, dtype)


@pytest.mark.parametrize("size", [ALONE[3], IN_TURN[0], CHUNKS[0]], ids=str)
def test_padding_leaves_the_state_as_it_is(machine: Machine, size: tuple[int, ...]) -> None:
    inputs = tensors(size, "bf16")
    inputs[PRESENT][0] = 0
    *_, state = computed(created(machine, size[4]), machine.memory(), inputs)
    assert near(state[0], inputs[STATE][0].astype(np.float64), "fp32")
    assert size[0] == 1 or (state[1] != inputs[STATE][1]).any()


@pytest.mark.parametrize("size", [ALONE[3], IN_TURN[0], IN_TURN[1]], ids=str)
def test_state_is_updated_in_place(machine: Machine, monkeypatch: pytest.MonkeyPatch, size: tuple[int, ...]) -> None:
    inputs = tensors(size, "bf16")
    for seed in ORDERS:
        monkeypatch.setenv("LLMEXPORT_EMULATOR_SEED", str(seed))
        memory = machine.memory()
        run = lay_out(created(machine, size[4]), memory, inputs)
        run.outputs[2] = Output.holding(memory, inputs[STATE])
        run.inputs[STATE] = run.outputs[2].address
        run.enqueue(memory.stream)
        assert right(machine, run.results(), inputs, "bf16")


@pytest.mark.parametrize("step", [-100.0, 19.9, 20.1, 1000.0])
def test_steps_of_any_size(machine: Machine, step: float) -> None:
    """exp of a step overflows where softplus does not."""
    inputs = tensors(ALONE[1], "fp32")
    inputs[A][:], inputs[DT_BIAS][:], inputs[A_LOG][:] = step, 0, -5
    assert right(machine, computed(created(machine, 32), machine.memory(), inputs), inputs, "fp32")


def test_without_tokens_the_state_goes_through(machine: Machine) -> None:
    inputs = tensors((2, 0, 1, 2, 16, 32), "fp16")
    gated, conv_state, state = computed(created(machine, 16), machine.memory(), inputs)
    assert gated.shape == (2, 0, 2, 32)
    assert conv_state.tobytes() == inputs[CONV_STATE].tobytes()
    assert state.tobytes() == inputs[STATE].tobytes()


def test_refuses_channels_that_are_no_heads(machine: Machine, capfd: pytest.CaptureFixture[str]) -> None:
    inputs = tensors((1, 1, 1, 2, 16, 16), "fp16")
    inputs[MIXED], inputs[TAPS] = random((1, 1, 80), "fp16", 1), random((80, 1, 4), "fp16", 1)
    inputs[CONV_STATE] = random((1, 3, 80), "fp16", 1)
    with pytest.raises(Refused):
        computed(created(machine, 16), machine.memory(), inputs)
    assert "llmexport: GatedDeltaNet: mixed has C = 80 channels, not G heads of D = 16" in capfd.readouterr().err


@pytest.mark.parametrize("size", [ALONE[3], IN_TURN[1]], ids=str)
@pytest.mark.parametrize("given", [-7, 0, 1, 2**31 - 1])
def test_an_end_outside_of_the_tokens_is_the_nearer_one_inside(
    machine: Machine, given: int, size: tuple[int, ...]
) -> None:
    inputs = tensors(size, "fp16")
    inputs[END][:] = given
    _, conv_state, _ = computed(created(machine, size[4]), machine.memory(), inputs)
    inputs[END][:] = min(max(given, 0), size[1])
    assert conv_state.tobytes() == last_seen(inputs).tobytes()


@pytest.mark.parametrize(
    ("taps", "state", "says"),
    [
        (5, 4, "weight has K = 5 taps, the kernels are for 2 to 4"),
        (4, 4, "state has S = 4 inputs, but weight K = 4 taps"),
    ],
)
def test_refuses_taps(machine: Machine, capfd: pytest.CaptureFixture[str], taps: int, state: int, says: str) -> None:
    inputs = tensors((1, 1, 1, 2, 16, 16), "fp16", taps)
    inputs[CONV_STATE] = random((1, state, 64), "fp16", 1)
    with pytest.raises(Refused):
        computed(created(machine, 16), machine.memory(), inputs)
    assert f"llmexport: GatedDeltaNet: {says}" in capfd.readouterr().err
