"""KimiDeltaRule's kernels against float64: token by token, in chunks of 16 tokens, and with decays of every strength.

Imports neither torch nor onnx: test_sanitizers.py runs it again under sanitizers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from kernel_numbers import Values, near, random, wide
from pairwise import pairwise
from plugin_host import DTYPES, Machine, computed, lay_out
from plugin_memory import Output

from llmexport.plugins.host import Plugin, Refused
from llmexport.validate.compare import compare
from llmexport.validate.tolerance import Tolerance

FP16_INFINITE = 65520.0  # and more is rounded up
FEW_TOKENS = 16  # up to here token by token
# As of GatedDeltaRule: fp32 numbers are multiplied as two bf16 parts, which leave out 2**-17 of each.
IN_CHUNKS = Tolerance(2.0**-15, 2.0**-16, scaled=True)
Q, K, V, G, BETA, STATE = range(6)
Inputs = list[Values]


def tensors(size: tuple[int, ...], dtype: str, seed: int = 1) -> Inputs:
    """Of a layer: decays of about a half, each channel's its own, strengths between 0 and 1."""
    b, t, h, d, v = size
    shapes = [(b, t, h, d), (b, t, h, d), (b, t, h, v), (b, t, h, d), (b, t, h), (b, h, d, v)]
    q, k, values, g, beta, state = (random(s, "fp32", seed + i) for i, s in enumerate(shapes))
    made = [q, k, values, -np.log1p(np.exp(g)), 1 / (1 + np.exp(-beta)), state]
    return [x.astype(DTYPES["fp32" if i in (G, STATE) else dtype]) for i, x in enumerate(made)]


def exact(inputs: Inputs, l2_norm: bool = True) -> tuple[Values, Values]:
    q, k, v, g, beta, state = wide(*inputs)
    if l2_norm:
        q, k = (x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    y = np.empty_like(v)
    for t in range(v.shape[1]):
        state = state * np.exp(g[:, t])[..., None]
        error = (v[:, t] - np.einsum("bhd,bhdv->bhv", k[:, t], state)) * beta[:, t, :, None]
        state = state + k[:, t, :, :, None] * error[:, :, None]
        y[:, t] = np.einsum("bhd,bhdv->bhv", scale(inputs) * q[:, t], state)
    return y, state


def scale(inputs: Inputs) -> float:
    return float(inputs[Q].shape[-1] ** -0.5)


def created(machine: Machine, inputs: Inputs, l2_norm: bool = True) -> Plugin:
    return machine.library.create("KimiDeltaRule", {"scale": scale(inputs), "l2_norm": l2_norm})


def run(machine: Machine, inputs: Inputs, l2_norm: bool = True, shift: int = 0) -> Inputs:
    return computed(created(machine, inputs, l2_norm), machine.memory(), inputs, shift)


def in_chunks(inputs: Inputs, shift: int = 0) -> bool:
    wide_enough = inputs[Q].shape[-1] in (64, 128) and inputs[Q].itemsize == 2
    return wide_enough and inputs[Q].shape[1] > FEW_TOKENS and shift == 0


def right_state(found: Values, state: Values, chunks: bool) -> bool:
    return compare(state, found).excess(IN_CHUNKS) <= 1 if chunks else near(found, state, "fp32")


def right(found: Inputs, inputs: Inputs, l2_norm: bool = True, shift: int = 0) -> bool:
    """y is rounded once, whatever the form."""
    y, state = exact(inputs, l2_norm)
    dtype = next(name for name, kind in DTYPES.items() if kind == inputs[V].dtype)
    return near(found[0], y, dtype) and right_state(found[1], state, in_chunks(inputs, shift))


# B, T, H, D, V: one token, few, many; any number of 16 rows, of a block's 32 columns a half, one, some.
SIZES = [(1, 1, 2, 128, 128), (2, 1, 3, 16, 16), (1, 7, 4, 64, 32), (2, 16, 3, 32, 64), (1, 63, 2, 64, 16)]
SIZES += [(1, 64, 1, 16, 64), (2, 65, 1, 32, 32), (1, 130, 2, 64, 32), (1, 130, 1, 128, 16)]
# Chunks full, one short, one over, with a rest; chunks of a block of prepare full, one over, with a rest.
CHUNKS = [(2, 17, 2, 64, 16), (1, 63, 2, 64, 32), (1, 64, 1, 64, 64), (1, 65, 2, 64, 32), (2, 130, 1, 64, 16)]
CHUNKS += [(1, 130, 1, 128, 128), (1, 48, 3, 128, 16)]


@pytest.mark.parametrize(("size", "dtype", "shift"), pairwise(SIZES, [*DTYPES], (0, 1)))
def test_sizes(machine: Machine, size: tuple[int, ...], dtype: str, shift: int) -> None:
    """With pointers that vectors can be read from, and others."""
    inputs = tensors(size, dtype)
    assert right(run(machine, inputs, shift=shift), inputs, shift=shift)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("size", CHUNKS, ids=str)
def test_chunks(machine: Machine, size: tuple[int, ...], dtype: str) -> None:
    inputs = tensors(size, dtype)
    assert in_chunks(inputs)
    assert right(run(machine, inputs), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_chunks_do_not_serve_goes_token_by_token(machine: Machine, dtype: str) -> None:
    """fp32, and pointers that no 16 bytes can be copied from."""
    inputs, shift = tensors((1, 65, 2, 64, 16), dtype), int(dtype != "fp32")
    assert not in_chunks(inputs, shift)
    assert right(run(machine, inputs, shift=shift), inputs, shift=shift)


@pytest.mark.parametrize("tokens", [9, 40])
def test_keys_as_they_are(machine: Machine, tokens: int) -> None:
    inputs = tensors((1, tokens, 2, 64, 32), "bf16")
    for i in (Q, K):
        norm = np.linalg.norm(wide(inputs[i])[0], axis=-1, keepdims=True)
        inputs[i] = (wide(inputs[i])[0] / norm).astype(inputs[i].dtype)
    assert right(run(machine, inputs, l2_norm=False), inputs, l2_norm=False)


def swap_channels(inputs: Inputs) -> None:
    inputs[G][:] = np.roll(inputs[G], 1, axis=-1)


def share_decay(inputs: Inputs) -> None:
    """As GatedDeltaRule has it."""
    inputs[G][:] = inputs[G].mean(-1, keepdims=True)


def swap_heads(inputs: Inputs) -> None:
    inputs[G][:] = inputs[G][:, :, ::-1]


def decay_late(inputs: Inputs) -> None:
    """By the decay of the token before."""
    inputs[G][:] = np.roll(inputs[G], 1, axis=1)


@pytest.mark.parametrize(("tokens", "dtype"), [(9, "fp32"), (9, "bf16"), (40, "fp16"), (40, "bf16")])
@pytest.mark.parametrize("mistake", [swap_channels, share_decay, swap_heads, decay_late])
def test_another_decay_is_found(machine: Machine, mistake: Callable[[Inputs], None], tokens: int, dtype: str) -> None:
    inputs = tensors((1, tokens, 2, 64, 16), dtype)
    meant = [x.copy() for x in inputs]
    mistake(inputs)
    found = run(machine, inputs)
    assert right(found, inputs)
    assert not near(found[0], exact(meant)[0], dtype)


def keep(g: Values) -> None:
    g[:] = 0


def weaken(g: Values) -> None:
    """Down to 2**-144 of a state in five tokens, past fp32's last in six."""
    g[:] = -20


def weaken_some(g: Values) -> None:
    """Channels that keep nearly all beside others that keep nothing which fp32 can hold."""
    g *= 1e-3
    g[..., ::3] = -110


def forget_some(g: Values) -> None:
    g[:, 5::20, :, 1::2] = -np.inf


def grow(g: Values) -> None:
    g[..., ::2] *= -0.05


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decay", [keep, weaken, weaken_some, forget_some, grow])
def test_decays(machine: Machine, decay: Callable[[Values], None], dtype: str) -> None:
    inputs = tensors((1, 66, 1, 64, 32), dtype)
    decay(inputs[G])
    assert right(run(machine, inputs), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_keys_of_full_strength(machine: Machine, dtype: str) -> None:
    """The state answers the key with the last value."""
    inputs = tensors((1, 65, 2, 64, 32), dtype)
    inputs[K][:], inputs[BETA][:], inputs[G][:] = inputs[K][:, :1], 1, 0
    found = run(machine, inputs)
    assert right(found, inputs)
    keys = wide(inputs[K])[0][0, 0]
    units = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    answer = np.einsum("hd,hdv->hv", units, wide(found[1])[0][0])
    assert right_state(answer, wide(inputs[V])[0][0, -1], in_chunks(inputs))


@pytest.mark.parametrize("tokens", [7, 40])
def test_keys_of_nothing(machine: Machine, tokens: int) -> None:
    """The norm of a zero key is not zero."""
    inputs = tensors((1, tokens, 2, 64, 32), "bf16")
    inputs[K][:, 3:6], inputs[Q][:, 4:5] = 0, 0
    assert right(run(machine, inputs), inputs)


@pytest.mark.parametrize("tokens", [7, 40])
def test_padding_leaves_the_state_as_it_is(machine: Machine, tokens: int) -> None:
    """Bit by bit: it has decays of 1 and no strength."""
    inputs = tensors((2, tokens, 2, 64, 32), "bf16")
    inputs[G][:], inputs[BETA][:] = 0, 0
    assert run(machine, inputs)[1].tobytes() == inputs[STATE].tobytes()


@pytest.mark.parametrize("tokens", [7, 40])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("size", [2.0**-12, 2.0**13])
def test_values_of_any_size(machine: Machine, size: float, dtype: str, tokens: int) -> None:
    inputs = tensors((1, tokens, 1, 64, 32), dtype)
    inputs[V] *= np.array(size, inputs[V].dtype)
    inputs[STATE] *= np.float32(size * 8)
    y, state = exact(inputs)
    found = run(machine, inputs)
    assert right_state(found[1], state, in_chunks(inputs))
    # The smaller of fp16 have fewer bits as subnormals: half of the smallest is off.
    unit = 2.0**-24 if dtype == "fp16" and size < 1 else 0.0
    most = {"fp16": 2.0**-10, "bf16": 2.0**-7}[dtype] * np.abs(y).max() + unit
    assert compare(y, found[0]).max_abs <= most


@pytest.mark.parametrize("tokens", [7, 40])
def test_what_fp16_cannot_hold_is_infinite(machine: Machine, tokens: int) -> None:
    """As the reference rounds it. The state goes on."""
    inputs = tensors((1, tokens, 1, 64, 32), "fp16")
    inputs[STATE] *= np.float32(2.0**22)
    y, state = exact(inputs)
    found = run(machine, inputs)
    assert np.isinf(found[0][:, 0]).any()
    assert (np.isinf(found[0]) == (np.abs(y) >= FP16_INFINITE)).all()
    assert right_state(found[1], state, in_chunks(inputs))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_nan_reaches_back_no_further_than_its_chunk(machine: Machine, dtype: str) -> None:
    """16 tokens, and of a value its column alone; what comes after it has it all."""
    inputs = tensors((1, 66, 1, 64, 32), dtype)
    inputs[V][0, 40, 0, 3] = np.nan
    y = wide(run(machine, inputs)[0])[0][0, :, 0]
    assert np.isfinite(np.delete(y, 3, axis=1)).all()
    assert np.isfinite(y[:32, 3]).all()
    assert np.isnan(y[40:, 3]).all()


@pytest.mark.parametrize("tokens", [1, 9, 40])
def test_state_is_updated_in_place(machine: Machine, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """Also of 128 columns, which several blocks take."""
    inputs = tensors((2, tokens, 1, 64, 128 if tokens == 1 else 32), "bf16")
    for seed in range(3):
        monkeypatch.setenv("LLMEXPORT_EMULATOR_SEED", str(seed))
        memory = machine.memory()
        prepared = lay_out(created(machine, inputs), memory, inputs)
        prepared.outputs[1] = Output.holding(memory, inputs[STATE])
        prepared.inputs[STATE] = prepared.outputs[1].address
        prepared.enqueue(memory.stream)
        assert right(prepared.results(), inputs)


@pytest.mark.parametrize(("dtype", "cuts"), [("fp16", (48,)), ("bf16", (1, 4, 40)), ("fp32", (1, 9))])
def test_calls_in_a_row_are_one_call(machine: Machine, dtype: str, cuts: tuple[int, ...]) -> None:
    inputs = tensors((2, 66, 2, 64, 16), dtype)
    parts, state = [], inputs[STATE]
    for pieces in zip(*(np.split(x, cuts, axis=1) for x in inputs[:STATE]), strict=True):
        y, state = run(machine, [*pieces, state])
        parts.append(y)
    assert right([np.concatenate(parts, 1), state], inputs)


@pytest.mark.parametrize("tokens", [9, 40])
def test_result_does_not_depend_on_the_order_of_threads(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    inputs, results = tensors((1, tokens, 1, 64, 32), "fp16"), set()
    for seed in range(4):
        monkeypatch.setenv("LLMEXPORT_EMULATOR_SEED", str(seed))
        results.add(b"".join(y.tobytes() for y in run(machine, inputs)))
    assert len(results) == 1


def test_no_token_keeps_the_state(machine: Machine) -> None:
    inputs = tensors((2, 0, 2, 64, 32), "bf16")
    y, state = run(machine, inputs)
    assert y.shape == (2, 0, 2, 32)
    assert state.tobytes() == inputs[STATE].tobytes()


@pytest.mark.parametrize(
    ("size", "says"),
    [
        ((1, 3, 1, 48, 16), "D is 48, but there are kernels for 16, 32, 64 and 128 only"),
        ((1, 3, 1, 16, 33), "V is 33, but there are kernels for 16, 32, 64 and 128 only"),
    ],
)
def test_refuses(machine: Machine, capfd: pytest.CaptureFixture[str], size: tuple[int, ...], says: str) -> None:
    with pytest.raises(Refused):
        run(machine, tensors(size, "fp16"))
    assert f"llmexport: KimiDeltaRule: {says}" in capfd.readouterr().err
