"""How far two runs of one model may differ, and why that far."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """Bounds on the largest absolute difference and on rms(difference) / rms(reference).

    `scaled`: the first bound is in units of the reference's largest magnitude, not absolute.
    """

    max_abs: float
    rms_ratio: float
    scaled: bool = False

    @property
    def text(self) -> str:
        of = " of the largest" if self.scaled else ""
        return f"{self.max_abs:.1g}{of}, {self.rms_ratio:.1g}"


def _sixteen_bit(roundoff: float) -> Tolerance:
    """Two right runs in a 16-bit type round in different places, once or twice an operation."""
    return Tolerance(16 * roundoff, 8 * roundoff, scaled=True)


# fp32: right exports of all families stay under 3e-6 and 7e-7, a wrong one starts at 1e-3; 1e-4 leaves room for
# depth. fp16 and bf16: the worst measured were 5 and 3 roundoffs, on tiny models of four families.
TOLERANCE = {
    "float32": Tolerance(1e-4, 1e-5),
    "float16": _sixteen_bit(2.0**-11),
    "bfloat16": _sixteen_bit(2.0**-8),
}
