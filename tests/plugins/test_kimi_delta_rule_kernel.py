"""KimiDeltaRule's kernels against float64: token by token, in chunks of 16 tokens, and with decays of every strength.

Imports neither torch nor onnx: test_sanitizers.py runs it again under sanitizers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from delta_rules import BETA, KIMI, STATE, G, Inputs, K, V, exact, in_chunks, right, right_state
from kernel_numbers import Values, near, wide
from pairwise import pairwise
from plugin_host import DTYPES, Machine

from llmexport.plugins.host import Refused

run, tensors = KIMI.run, KIMI.tensors

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
def test_padding_leaves_the_state_as_it_is(machine: Machine, tokens: int) -> None:
    """Bit by bit: it has decays of 1 and no strength."""
    inputs = tensors((2, tokens, 2, 64, 32), "bf16")
    inputs[G][:], inputs[BETA][:] = 0, 0
    assert run(machine, inputs)[1].tobytes() == inputs[STATE].tobytes()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_nan_reaches_back_no_further_than_its_chunk(machine: Machine, dtype: str) -> None:
    """16 tokens, and of a value its column alone; what comes after it has it all."""
    inputs = tensors((1, 66, 1, 64, 32), dtype)
    inputs[V][0, 40, 0, 3] = np.nan
    y = wide(run(machine, inputs)[0])[0][0, :, 0]
    assert np.isfinite(np.delete(y, 3, axis=1)).all()
    assert np.isfinite(y[:32, 3]).all()
    assert np.isnan(y[40:, 3]).all()


@pytest.mark.parametrize(("dtype", "cuts"), [("fp16", (48,)), ("bf16", (1, 4, 40)), ("fp32", (1, 9))])
def test_calls_in_a_row_are_one_call(machine: Machine, dtype: str, cuts: tuple[int, ...]) -> None:
    inputs = tensors((2, 66, 2, 64, 16), dtype)
    parts, state = [], inputs[STATE]
    for pieces in zip(*(np.split(x, cuts, axis=1) for x in inputs[:STATE]), strict=True):
        y, state = run(machine, [*pieces, state])
        parts.append(y)
    assert right([np.concatenate(parts, 1), state], inputs)


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
