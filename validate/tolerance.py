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


# fp32: right exports stay under 3e-6 and 7e-7 on tiny models of four families, and reach 1.0e-5 and 1.2e-6 on 18
# layers of gemma-2b; a wrong one starts at 1e-3. fp16 and bf16: the worst measured were 5 and 3 roundoffs, on models of
# 3 layers; the bounds leave room for deeper ones. What a model computes is judged by its rung in fp32, not by these.
TOLERANCE = {
    "float32": Tolerance(1e-4, 1e-5),
    "float16": _sixteen_bit(2.0**-11),
    "bfloat16": _sixteen_bit(2.0**-8),
}
