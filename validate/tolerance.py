"""How far two runs of one model may differ, and why that far."""

from __future__ import annotations

from dataclasses import dataclass

from llmexport.export.assembly import Assembly
from llmexport.export.spec import DecoderLayer, GatedDeltaNet


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
# Two right forms of the delta rule in fp32, chunk by chunk and token by token, differ by up to 3e-4 in the logits: the
# state feeds back into itself. The op itself is held to 1e-5 of a recurrence in float64, by its own tests.
RECURRENT = Tolerance(5e-4, 5e-5)


def tolerance(dtype: str, assembly: Assembly) -> Tolerance:
    """How far two runs of a whole model may differ."""
    layers = [s.block for s in assembly.steps if isinstance(s.block, DecoderLayer)]
    recurrent = any(isinstance(layer.mixer, GatedDeltaNet) for layer in layers)
    return RECURRENT if recurrent and dtype == "float32" else TOLERANCE[dtype]
