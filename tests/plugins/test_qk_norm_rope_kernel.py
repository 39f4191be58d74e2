"""QkNormRope's kernels against float64: heads of a lane, of part of a warp, of more units than lanes; odd sizes.

Imports neither torch nor onnx: test_sanitizers.py runs it again under sanitizers.
"""

from __future__ import annotations

import numpy as np
import pytest
from kernel_numbers import Values, near, random, rounded, same
from pairwise import pairwise
from plugin_host import DTYPES, Machine, computed

EPSILON, OFFSET = 1e-6, 1.0
# B, T, H, G, D, R: one pair; odd sizes; whole vectors in part of a warp, in a warp, in more; a part of a head that
# turns; heads that fill no block, and that fill several.
SIZES = [(1, 1, 1, 1, 2, 1), (2, 3, 5, 1, 10, 5), (1, 65, 2, 2, 7, 2), (2, 3, 8, 2, 64, 32), (1, 5, 40, 8, 128, 64)]
SIZES += [(2, 3, 4, 2, 128, 32), (1, 2, 3, 1, 256, 128), (1, 2, 2, 1, 256, 32), (1, 2, 9, 3, 512, 256)]
NORMS = ("none", "first", "last")


def normed(x: Values, weight: Values, early: bool, dtype: str) -> Values:
    """The norm of each head in float64, rounded as the op says."""
    y = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + EPSILON)
    scale = weight.astype(np.float64) + OFFSET
    y, scale = (rounded(v, dtype) if early else v for v in (y, scale))
    return rounded(y * scale, dtype)


def turned(x: Values, cos: Values, sin: Values, interleaved: bool, dtype: str) -> Values:
    """The pairs of x [B, T, heads, D] as complex numbers in float64, rounded."""
    r = cos.shape[-1]
    first, second = (slice(0, 2 * r, 2), slice(1, 2 * r, 2)) if interleaved else (slice(0, r), slice(r, 2 * r))
    pairs = (x[..., first] + 1j * x[..., second]) * (cos.astype(np.float64) + 1j * sin.astype(np.float64))[:, :, None]
    y = x.copy()
    y[..., first], y[..., second] = rounded(pairs.real, dtype), rounded(pairs.imag, dtype)
    return y


def exact(x: Values, cos: Values, sin: Values, weight: Values, interleaved: bool, norm: str, early: bool) -> Values:
    dtype = next(n for n, d in DTYPES.items() if d == x.dtype)
    y = x.astype(np.float64)
    if norm == "first":
        y = normed(y, weight, early, dtype)
    y = turned(y, cos, sin, interleaved, dtype)
    return (normed(y, weight, early, dtype) if norm == "last" else y).swapaxes(1, 2)


def made(
    machine: Machine, inputs: list[Values], interleaved: bool, norm: str, early: bool, shift: int = 0
) -> list[Values]:
    attributes = {"interleaved": interleaved, "epsilon": EPSILON, "weight_offset": OFFSET}
    attributes |= {"round_before_weight": early, "norm_first": norm != "last"}
    given = inputs[:5] if norm == "none" else inputs
    return computed(machine.library.create("QkNormRope", attributes), machine.memory(), given, shift)


def with_more(q: Values, behind: int) -> Values:
    """q with so many NaN behind each head."""
    return np.pad(q, ((0, 0),) * 3 + ((0, behind),), constant_values=np.nan)


def drawn(size: tuple[int, ...], dtype: str) -> list[Values]:
    b, t, h, g, d, r = size
    shapes = [(b, t, h, d), (b, t, g, d), (b, t, g, d), (b, t, r), (b, t, r), (d,), (d,)]
    return [random(shape, dtype, seed) for seed, shape in enumerate(shapes)]


@pytest.mark.parametrize(
    ("size", "dtype", "interleaved", "norm", "early", "shift", "behind"),
    pairwise(SIZES, [*DTYPES], (False, True), NORMS, (False, True), (0, 1), (0, 5, 64)),
)
def test_sizes(
    machine: Machine,
    size: tuple[int, ...],
    dtype: str,
    interleaved: bool,
    norm: str,
    early: bool,
    shift: int,
    behind: int,
) -> None:
    inputs = drawn(size, dtype)
    q, k, v, cos, sin, q_weight, k_weight = inputs
    inputs[0] = with_more(q, behind)
    query, key, value = made(machine, inputs, interleaved, norm, early, shift)
    for x, weight, found in ((q, q_weight, query), (k, k_weight, key)):
        wanted = exact(x, cos, sin, weight, interleaved, norm, early)
        assert near(found, wanted, dtype, roundings=2 + early)
        assert dtype == "fp32" or same(found, wanted) > 0.97
    assert (value == v.swapaxes(1, 2)).all()


@pytest.mark.parametrize("interleaved", [False, True])
def test_what_does_not_turn_keeps_its_bits(machine: Machine, interleaved: bool) -> None:
    inputs = drawn((2, 3, 4, 2, 128, 32), "bf16")
    query, key, _ = made(machine, inputs, interleaved, "none", False)
    assert (query[..., 64:] == inputs[0].swapaxes(1, 2)[..., 64:]).all()
    assert (key[..., 64:] == inputs[1].swapaxes(1, 2)[..., 64:]).all()


def test_a_head_of_zeros_gives_zeros(machine: Machine) -> None:
    inputs = drawn((1, 3, 4, 2, 64, 32), "fp16")
    inputs[0][:, :, 1] = 0
    query, _, _ = made(machine, inputs, False, "first", True)
    assert not query[:, 1].any()
    assert query[:, 0].any()


def test_no_tokens_are_no_error(machine: Machine) -> None:
    query, key, value = made(machine, drawn((2, 0, 4, 2, 64, 32), "fp16"), False, "first", False)
    assert (query.shape, key.shape, value.shape) == ((2, 4, 0, 64), (2, 2, 0, 64), (2, 2, 0, 64))
