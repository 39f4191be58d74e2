"""GatedDeltaRule's kernels against float64: token by token, in chunks of 64 tokens, and what is hard for chunks.

Imports neither torch nor onnx: test_sanitizers.py runs it again under sanitizers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from kernel_numbers import Values, near, random, wide
from plugin_host import DTYPES, Machine, computed, lay_out
from plugin_memory import Output

from llmexport.plugins.host import Plugin, Refused
from llmexport.validate.compare import compare
from llmexport.validate.tolerance import Tolerance

FP16_INFINITE = 65520.0  # and more is rounded up
FEW_TOKENS = 16  # up to here token by token
# The chunked form multiplies fp32 numbers as two bf16 parts, which leave out 2**-17 of each; a state is the sum of
# several such products. Measured on the emulator: 7e-6 of the largest, 5e-6 rms. A part left out gives 1e-3.
IN_CHUNKS = Tolerance(2.0**-15, 2.0**-16, scaled=True)
Q, K, V, G, BETA, STATE = range(6)
Inputs = list[Values]


def tensors(size: tuple[int, ...], dtype: str, seed: int = 1) -> Inputs:
    """Of a layer: decays of about a half, strengths between 0 and 1."""
    b, t, groups, h, d, v = size
    shapes = [(b, t, groups, d), (b, t, groups, d), (b, t, h, v), (b, t, h), (b, t, h), (b, h, d, v)]
    q, k, values, g, beta, state = (random(s, "fp32", seed + i) for i, s in enumerate(shapes))
    made = [q, k, values, -np.log1p(np.exp(g)), 1 / (1 + np.exp(-beta)), state]
    return [x.astype(DTYPES["fp32" if i in (G, STATE) else dtype]) for i, x in enumerate(made)]


def exact(inputs: Inputs, l2_norm: bool = True) -> tuple[Values, Values]:
    q, k, v, g, beta, state = wide(*inputs)
    if l2_norm:
        q, k = (x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    q, k = (x.repeat(v.shape[2] // x.shape[2], 2) for x in (q * scale(inputs), k))
    y = np.empty_like(v)
    for t in range(v.shape[1]):
        state = state * np.exp(g[:, t])[..., None, None]
        error = (v[:, t] - np.einsum("bhd,bhdv->bhv", k[:, t], state)) * beta[:, t, :, None]
        state = state + k[:, t, :, :, None] * error[:, :, None]
        y[:, t] = np.einsum("bhd,bhdv->bhv", q[:, t], state)
    return y, state


def scale(inputs: Inputs) -> float:
    return float(inputs[Q].shape[-1] ** -0.5)


def created(machine: Machine, inputs: Inputs, l2_norm: bool = True) -> Plugin:
    return machine.library.create("GatedDeltaRule", {"scale": scale(inputs), "l2_norm": l2_norm})


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


# B, T, G, H, D, V: one token, few, any number of 16 or 32 rows; chunks full, one short, one over, with a rest.
FEW = [(1, 1, 1, 2, 128, 128), (2, 1, 2, 2, 16, 16), (1, 7, 2, 4, 64, 32), (2, 16, 1, 3, 32, 64), (1, 65, 1, 1, 16, 16)]
CHUNKS = [(2, 17, 1, 2, 64, 16), (1, 63, 1, 2, 64, 32), (1, 64, 1, 1, 64, 64), (1, 65, 2, 4, 64, 32)]
CHUNKS += [(2, 130, 1, 1, 64, 16), (1, 130, 1, 1, 128, 128), (1, 64, 1, 2, 128, 16)]


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", FEW, ids=str)
def test_token_by_token(machine: Machine, size: tuple[int, ...], dtype: str, shift: int) -> None:
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
    inputs, shift = tensors((1, 65, 1, 2, 64, 16), dtype), int(dtype != "fp32")
    assert not in_chunks(inputs, shift)
    assert right(run(machine, inputs, shift=shift), inputs, shift=shift)


@pytest.mark.parametrize("size", [(1, 5, 1, 2, 64, 32), (1, 70, 1, 2, 64, 32)], ids=["tokens", "chunks"])
def test_keys_as_they_are(machine: Machine, size: tuple[int, ...]) -> None:
    inputs = tensors(size, "bf16")
    for i in (Q, K):
        norm = np.linalg.norm(wide(inputs[i])[0], axis=-1, keepdims=True)
        inputs[i] = (wide(inputs[i])[0] / norm).astype(inputs[i].dtype)
    assert right(run(machine, inputs, l2_norm=False), inputs, l2_norm=False)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_equal_keys_of_full_strength(machine: Machine, dtype: str) -> None:
    """All of a chunk's entries are one: a power series of its matrix would reach 2**63."""
    inputs = tensors((1, 130, 1, 2, 64, 32), dtype)
    inputs[K][:], inputs[BETA][:], inputs[G][:] = inputs[K][:, :1], 1, 0
    found = run(machine, inputs)
    assert right(found, inputs)
    # The state answers the key with the last value.
    key = wide(inputs[K])[0][0, 0, 0] / np.linalg.norm(wide(inputs[K])[0][0, 0, 0])
    answer = np.einsum("d,hdv->hv", key, wide(found[1])[0][0])
    assert compare(wide(inputs[V])[0][0, -1], answer).excess(IN_CHUNKS) <= 1


def weaken(g: Values) -> None:
    g[:] = -20


def weaken_some(g: Values) -> None:
    """Differences must hold where the sums are thousands, as at the end of a chunk."""
    g[:] = -0.01
    g[:, ::3] = -100


def forget(g: Values) -> None:
    g[:, 5::20] = -np.inf


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("decay", [weaken, weaken_some, forget])
def test_decays(machine: Machine, decay: Callable[[Values], None], dtype: str) -> None:
    inputs = tensors((1, 128, 1, 1, 64, 32), dtype)
    decay(inputs[G])
    assert right(run(machine, inputs), inputs)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_all_is_forgotten_and_nothing_learned(machine: Machine, dtype: str) -> None:
    """What a chunk adds to a large state is then next to nothing: neither may be scaled by the other alone."""
    inputs = tensors((1, 64, 1, 1, 64, 32), dtype)
    # What is left of the state is above 2**-126, below which a decay is 0.
    inputs[G][:, -1], inputs[BETA][:, -1] = -86, 0
    inputs[G][:, :-1] = -0.01
    inputs[STATE] *= np.float32(2.0**12)
    found, (_, state) = run(machine, inputs), exact(inputs)
    assert right_state(found[1], state, chunks=True)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_growth(machine: Machine, dtype: str) -> None:
    """Each token is measured by itself: the last is 600 times the first."""
    inputs = tensors((1, 130, 1, 1, 64, 32), dtype)
    inputs[G][:] = 0.05
    found, (y, state) = run(machine, inputs), exact(inputs)
    assert all(near(found[0][:, t], y[:, t], dtype) for t in range(130))
    assert right_state(found[1], state, chunks=True)


@pytest.mark.parametrize("tokens", [7, 70])
def test_keys_of_nothing(machine: Machine, tokens: int) -> None:
    """As of padding; the norm of a zero key is not zero."""
    inputs = tensors((1, tokens, 1, 2, 64, 32), "bf16")
    inputs[K][:, 3:6], inputs[Q][:, 4:5] = 0, 0
    assert right(run(machine, inputs), inputs)


@pytest.mark.parametrize("tokens", [7, 70])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("size", [2.0**-12, 2.0**13])
def test_values_of_any_size(machine: Machine, size: float, dtype: str, tokens: int) -> None:
    """Of fp16 the larger would overflow as an operand, as the state does not."""
    inputs = tensors((1, tokens, 1, 1, 64, 32), dtype)
    inputs[V] *= np.array(size, inputs[V].dtype)
    inputs[STATE] *= np.float32(size * 8)
    y, state = exact(inputs)
    found = run(machine, inputs)
    assert right_state(found[1], state, in_chunks(inputs))
    # The smaller of fp16 have fewer bits as subnormals: half of the smallest is off.
    unit = 2.0**-24 if dtype == "fp16" and size < 1 else 0.0
    most = {"fp16": 2.0**-10, "bf16": 2.0**-7}[dtype] * np.abs(y).max() + unit
    assert compare(y, found[0]).max_abs <= most


@pytest.mark.parametrize("tokens", [7, 70])
def test_what_fp16_cannot_hold_is_infinite(machine: Machine, tokens: int) -> None:
    """As the reference rounds it. The state goes on."""
    inputs = tensors((1, tokens, 1, 1, 64, 32), "fp16")
    inputs[STATE] *= np.float32(2.0**22)
    y, state = exact(inputs)
    found = run(machine, inputs)
    assert np.isinf(found[0][:, 0]).any()
    assert (np.isinf(found[0]) == (np.abs(y) >= FP16_INFINITE)).all()
    assert right_state(found[1], state, in_chunks(inputs))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_nan_reaches_back_no_further_than_its_tile(machine: Machine, dtype: str) -> None:
    """16 tokens, and of a value its column alone; what comes after it has it all."""
    inputs = tensors((1, 130, 1, 1, 64, 32), dtype)
    inputs[V][0, 104, 0, 3] = np.nan
    y = wide(run(machine, inputs)[0])[0][0, :, 0]
    assert np.isfinite(np.delete(y, 3, axis=1)).all()
    assert np.isfinite(y[:96, 3]).all()
    assert np.isnan(y[104:, 3]).all()


@pytest.mark.parametrize("tokens", [1, 9, 70])
def test_state_is_updated_in_place(machine: Machine, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """Also of 128 columns, which several blocks take."""
    inputs = tensors((2, tokens, 1, 1, 64, 128 if tokens == 1 else 32), "bf16")
    for seed in range(3):
        monkeypatch.setenv("LLMEXPORT_EMULATOR_SEED", str(seed))
        memory = machine.memory()
        prepared = lay_out(created(machine, inputs), memory, inputs)
        prepared.outputs[1] = Output.holding(memory, inputs[STATE])
        prepared.inputs[STATE] = prepared.outputs[1].address
        prepared.enqueue(memory.stream)
        assert right(prepared.results(), inputs)


@pytest.mark.parametrize(("dtype", "cuts"), [("fp16", (64,)), ("bf16", (1, 40)), ("fp32", (9,))])
def test_calls_in_a_row_are_one_call(machine: Machine, dtype: str, cuts: tuple[int, ...]) -> None:
    inputs = tensors((1, 100, 1, 2, 64, 16), dtype)
    parts, state = [], inputs[STATE]
    for pieces in zip(*(np.split(x, cuts, axis=1) for x in inputs[:STATE]), strict=True):
        y, state = run(machine, [*pieces, state])
        parts.append(y)
    assert right([np.concatenate(parts, 1), state], inputs)


@pytest.mark.parametrize("tokens", [9, 70])
def test_result_does_not_depend_on_the_order_of_threads(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    inputs, results = tensors((1, tokens, 1, 1, 64, 32), "fp16"), set()
    for seed in range(4):
        monkeypatch.setenv("LLMEXPORT_EMULATOR_SEED", str(seed))
        results.add(b"".join(y.tobytes() for y in run(machine, inputs)))
    assert len(results) == 1


def test_no_token_keeps_the_state(machine: Machine) -> None:
    inputs = tensors((2, 0, 1, 2, 64, 32), "bf16")
    y, state = run(machine, inputs)
    assert y.shape == (2, 0, 2, 32)
    assert state.tobytes() == inputs[STATE].tobytes()


@pytest.mark.parametrize(
    ("size", "says"),
    [
        ((1, 3, 1, 1, 48, 16), "D is 48, but there are kernels for 16, 32, 64 and 128 only"),
        ((1, 3, 1, 1, 16, 256), "V is 256, but there are kernels for 16, 32, 64 and 128 only"),
        ((1, 3, 2, 3, 16, 16), "v has H = 3 heads, no multiple of the G = 2 of q and k"),
    ],
)
def test_refuses(machine: Machine, capfd: pytest.CaptureFixture[str], size: tuple[int, ...], says: str) -> None:
    with pytest.raises(Refused):
        run(machine, tensors(size, "fp16"))
    assert f"llmexport: GatedDeltaRule: {says}" in capfd.readouterr().err
