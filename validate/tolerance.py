"""How far two runs of one model may differ, and why that far."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """Bounds on the largest absolute difference and on rms(difference) / rms(reference)."""

    max_abs: float
    rms_ratio: float


# fp32: right exporters stay under 1e-5 on logits of order one; a wrong one starts at 1e-3.
# fp16, bf16: the runs round in different places; see the comment at each.
WHOLE = {
    "float32": Tolerance(1e-4, 1e-5),
    "float16": Tolerance(2e-2, 4e-3),
    "bfloat16": Tolerance(2e-1, 3e-2),
}
# One block alone, from the same inputs. Hidden states grow with depth, so the bound is looser on the largest
# absolute difference and the same on the ratio.
BLOCK = WHOLE
