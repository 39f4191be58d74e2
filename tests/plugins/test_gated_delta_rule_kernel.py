"""GatedDeltaRule's kernels against float64: token by token, in chunks of 64 tokens, and what is hard for chunks.

Imports neither torch nor onnx: test_sanitizers.py runs it again under sanitizers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from delta_rules import BETA, GATED, IN_CHUNKS, STATE, G, K, V, exact, in_chunks, right, right_state
from kernel_numbers import Values, near, wide
from plugin_host import DTYPES, Machine

from llmexport.plugins.host import Refused
from llmexport.validate.compare import compare

run, tensors = GATED.run, GATED.tensors

# B, T, G, H, D, V: one token, few, any number of 16 or 32 rows; chunks full, one short, one over, with a rest.
FEW = [(1, 1, 1, 2, 128, 128), (2, 1, 2, 2, 16, 16), (1, 7, 2, 4, 64, 32), (2, 16, 1, 3, 32, 64), (1, 65, 1, 1, 16, 16)]
CHUNKS = [(2, 17, 1, 2, 64, 16), (1, 63, 1, 2, 64, 32), (1, 64, 1, 1, 64, 64), (1, 65, 2, 4, 64, 32)]
CHUNKS += [(2, 130, 1, 1, 64, 16), (1, 130, 1, 1, 128, 128), (1, 64, 1, 2, 128, 16)]
# Odd heads; a last chunk that ends within each of its tiles of 16; more columns than a block's, all or half used.
CHUNKS += [(1, 83, 3, 9, 64, 16), (1, 97, 1, 3, 64, 64), (1, 113, 1, 1, 128, 32), (3, 33, 5, 5, 128, 16)]


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


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_nan_reaches_back_no_further_than_its_tile(machine: Machine, dtype: str) -> None:
    """16 tokens, and of a value its column alone; what comes after it has it all."""
    inputs = tensors((1, 130, 1, 1, 64, 32), dtype)
    inputs[V][0, 104, 0, 3] = np.nan
    y = wide(run(machine, inputs)[0])[0][0, :, 0]
    assert np.isfinite(np.delete(y, 3, axis=1)).all()
    assert np.isfinite(y[:96, 3]).all()
    assert np.isnan(y[104:, 3]).all()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_padding_leaves_the_state_as_it_is(machine: Machine, dtype: str) -> None:
    """Bit by bit: it has decays of 1 and no strength. Tokens that follow it are as without it."""
    inputs = tensors((2, 150, 1, 2, 64, 32), dtype)
    inputs[G][:, :70], inputs[BETA][:, :70] = 0, 0
    padding = [x[:, :70] for x in inputs[:STATE]]
    assert run(machine, [*padding, inputs[STATE]])[1].tobytes() == inputs[STATE].tobytes()
    y, state = run(machine, inputs)
    rest = [*(x[:, 70:] for x in inputs[:STATE]), inputs[STATE]]
    assert right([y[:, 70:], state], rest)


@pytest.mark.parametrize(("dtype", "cuts"), [("fp16", (64,)), ("bf16", (1, 40)), ("fp32", (9,))])
def test_calls_in_a_row_are_one_call(machine: Machine, dtype: str, cuts: tuple[int, ...]) -> None:
    inputs = tensors((1, 100, 1, 2, 64, 16), dtype)
    parts, state = [], inputs[STATE]
    for pieces in zip(*(np.split(x, cuts, axis=1) for x in inputs[:STATE]), strict=True):
        y, state = run(machine, [*pieces, state])
        parts.append(y)
    assert right([np.concatenate(parts, 1), state], inputs)


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
