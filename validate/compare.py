"""The one place where numbers are compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmexport.plugins.errors import UserError
from llmexport.validate.tolerance import Tolerance


class Mismatch(UserError):
    """Two runs that cannot be compared, or files that do not belong together."""


@dataclass(frozen=True)
class Difference:
    """How far `found` is from a reference.

    max_abs is the largest |found - reference|, rms_ratio is rms(found - reference) / rms(reference): both are NaN if
    either run holds a NaN, and then within no tolerance. scale is the reference's largest magnitude, spread the
    distance from its least number to its largest.
    """

    max_abs: float
    rms_ratio: float
    scale: float
    spread: float

    def excess(self, tolerance: Tolerance) -> float:
        """How many times the tolerance this is: up to 1 is within; infinite if there is a NaN."""
        bound = tolerance.max_abs * (self.scale if tolerance.scaled else 1.0)
        largest = self.max_abs / bound if bound else math.inf
        parts = [largest if self.max_abs else 0.0, self.rms_ratio / tolerance.rms_ratio]
        return math.inf if any(map(math.isnan, parts)) else max(parts)


def median(differences: Sequence[Difference]) -> Difference:
    """The median largest error and the median rms, each by itself, in units of the reference."""
    largest = [d.max_abs / d.scale if d.scale else 0.0 for d in differences]
    return Difference(float(np.median(largest)), float(np.median([d.rms_ratio for d in differences])), 1.0, 1.0)


def compare(
    reference: np.ndarray, found: np.ndarray, where: np.ndarray | None = None, strays: float = 0.0
) -> Difference:
    """The difference of two arrays of one shape, in float64, over the leading entries that `where` selects.

    `strays` is the share of rows (along the last axis) that is left out: the rows that differ most, but none that is
    not finite. Raises Mismatch if the shapes differ.
    """
    if reference.shape != found.shape:
        raise Mismatch(f"shapes differ: {list(reference.shape)} and {list(found.shape)}")
    if where is not None:
        reference, found = reference[where], found[where]
    if reference.size == 0:
        return Difference(0.0, 0.0, 0.0, 0.0)
    wide = reference.astype(np.float64)
    error = found.astype(np.float64) - wide
    if strays:
        wide, error = (x.reshape(-1, x.shape[-1]) for x in (wide, error))
        furthest = np.abs(error).max(-1)
        order = np.argsort(np.where(np.isfinite(furthest), furthest, -1))
        kept = order[: math.ceil((1 - strays) * len(error))]
        wide, error = wide[kept], error[kept]
    scale = float(np.sqrt(np.mean(wide**2)))
    rms = float(np.sqrt(np.mean(error**2)))
    ratio = rms / scale if scale else (0.0 if rms == 0 else float("inf"))
    return Difference(float(np.max(np.abs(error))), ratio, float(np.max(np.abs(wide))), float(np.ptp(wide)))
