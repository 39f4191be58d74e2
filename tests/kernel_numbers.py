"""What the tests of kernels share: random inputs, and how near a result must be to the exact one.

Imports neither torch nor onnx: test_sanitizers.py runs those tests under sanitizers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from plugin_host import DTYPES

from llmexport.validate.compare import compare
from llmexport.validate.tolerance import Tolerance

# Results are rounded once; the largest is off by half a unit in its last place, or by one where
# fp32 inside falls on the other side of a tie than float64. rms: a uniform rounding error is 0.29 units.
HALVES = ("fp16", "bf16")
UNIT = {"fp32": 2.0**-23, "fp16": 2.0**-10, "bf16": 2.0**-7}
# fp32 inside adds a few units of its own; rsqrt, exp and erf are good to two.
UNITS = {"fp32": (8.0, 4.0), "fp16": (1.01, 0.4), "bf16": (1.01, 0.4)}

Values = np.ndarray[Any, Any]


def random(shape: tuple[int, ...], dtype: str, seed: int) -> Values:
    return np.random.default_rng(seed).standard_normal(shape).astype(DTYPES[dtype])


def near(found: Values, exact: Values, dtype: str, roundings: int = 1) -> bool:
    """`roundings` to the dtype one after another, each of which may fall on the other side of a tie."""
    most, rms = UNITS[dtype]
    bound = Tolerance(roundings * most * UNIT[dtype], rms * UNIT[dtype], scaled=True)
    return compare(exact, found).excess(bound) <= 1


def same(found: Values, exact: Values) -> float:
    """The part of a result that is the exact one rounded: near 1 if each rounding is where it should be, as fp32
    inside seldom falls on another side of a tie; another place of one, or one less, changes a quarter or more.
    """
    return float((found == exact.astype(found.dtype)).mean())


def rounded(exact: Values, dtype: str) -> Values:
    """To the dtype, and back to float64."""
    return exact.astype(DTYPES[dtype]).astype(np.float64)


def wide(*arrays: Values) -> tuple[Values, ...]:
    return tuple(a.astype(np.float64) for a in arrays)
