"""The one place where numbers are compared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmexport.plugins.errors import UserError
from llmexport.validate.tolerance import Tolerance


class Mismatch(UserError):
    """Two runs that cannot be compared, or files that do not belong together."""


@dataclass(frozen=True)
class Difference:
    """max |found - reference|, and rms(found - reference) / rms(reference); NaN if either holds one."""

    max_abs: float
    rms_ratio: float

    def within(self, tolerance: Tolerance) -> bool:
        return self.max_abs <= tolerance.max_abs and self.rms_ratio <= tolerance.rms_ratio

    def worst(self, other: Difference) -> Difference:
        """The larger of each; a NaN stays."""
        return Difference(
            float(np.maximum(self.max_abs, other.max_abs)), float(np.maximum(self.rms_ratio, other.rms_ratio))
        )


EQUAL = Difference(0.0, 0.0)


def compare(reference: np.ndarray, found: np.ndarray, where: np.ndarray | None = None) -> Difference:
    """The difference of two arrays of one shape, in float64, over the leading entries that `where` selects.

    Raises Mismatch if the shapes differ.
    """
    if reference.shape != found.shape:
        raise Mismatch(f"shapes differ: {list(reference.shape)} and {list(found.shape)}")
    if where is not None:
        reference, found = reference[where], found[where]
    if reference.size == 0:
        return EQUAL
    wide = reference.astype(np.float64)
    error = found.astype(np.float64) - wide
    scale = float(np.sqrt(np.mean(wide**2)))
    rms = float(np.sqrt(np.mean(error**2)))
    return Difference(float(np.max(np.abs(error))), rms / scale if scale else (0.0 if rms == 0 else float("inf")))
