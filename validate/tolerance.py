"""How far two runs of one model may differ, and why that far."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmexport.export.assembly import parts
from llmexport.export.spec import Assembly, GatedDeltaNet, MlpWithExperts, Moe, Part, Step

if TYPE_CHECKING:
    from llmexport.export.exported import Export
    from llmexport.validate.compare import Difference

# A right export in 16 bits is no further from fp32 than another right run in 16 bits is, by this factor. The distance
# depends on the model: transformers itself is 2 to 28 roundoffs of the rms off in fp16 (Llama of 3 to 24 layers,
# deviation 0.02 to 0.4; qwen3, gemma2, mixtral). Against the larger of the error in the same step and the median one,
# other right runs were off by at most 2.1 times as much, and 1.2 times of the rms.
FACTOR = 3.0
# No bound is ever wider than this share of the reference: other logits of its kind are 1.4 times its rms off.
MOST = 0.25


@dataclass(frozen=True)
class Tolerance:
    """Bounds on the largest absolute difference and on rms(difference) / rms(reference).

    `scaled`: the first bound is in units of the reference's largest magnitude, not absolute. `strays`: the share of
    tokens that may lie beyond. `cut`: a right run may be further off than these bounds, which stop at MOST.
    """

    max_abs: float
    rms_ratio: float
    scaled: bool = False
    strays: float = 0.0
    cut: bool = False

    def widened(self, yardstick: Difference) -> Tolerance:
        """The same, or FACTOR times how far the `yardstick` is, a run known to be right, if that is more.

        Never more than MOST, beyond which a comparison cannot tell right from wrong.
        """
        measured = (yardstick.max_abs / (yardstick.scale or 1.0), yardstick.rms_ratio)
        bounds = (self.max_abs, self.rms_ratio)
        # A yardstick that is not finite measures nothing.
        wider = [FACTOR * m if math.isfinite(m) else 0.0 for m in measured]
        far, rms = (max(b, min(w, MOST)) for b, w in zip(bounds, wider, strict=True))
        return dataclasses.replace(self, max_abs=far, rms_ratio=rms, cut=self.cut or max(wider) > MOST)

    @property
    def carried(self) -> Tolerance:
        """For the steps of a run that read what earlier ones kept: where tokens may stray, up to MOST.

        A token that strayed stays in the caches and puts all later ones of its row off. Of 260 right runs of five
        families one in four was 0.02 to 0.26 of the rms off in such a step, some where transformers was 0.002 off.
        """
        far, rms = max(self.max_abs, MOST), max(self.rms_ratio, MOST)
        return dataclasses.replace(self, max_abs=far, rms_ratio=rms) if self.strays else self

    @property
    def text(self) -> str:
        of = " of the largest" if self.scaled else ""
        share = f", {1 - self.strays:.0%} of tokens" if self.strays else ""
        return f"{self.max_abs:.1g}{of}, {self.rms_ratio:.1g}{share}"


def _sixteen_bit(roundoff: float) -> Tolerance:
    """Two right runs in a 16-bit type round in different places, once or twice an operation."""
    return Tolerance(16 * roundoff, 8 * roundoff, scaled=True)


# fp32: right exports stay under 3e-6 and 7e-7 on tiny models of four families, and reach 1.0e-5 and 1.2e-6 on 18
# layers of gemma-2b; a wrong one starts at 1e-3. fp16 and bf16: the bounds are 16 and 8 roundoffs, or what the model
# makes of them (Tolerance.widened). The rung in fp32 judges what a model computes; these do not.
TOLERANCE = {
    "float32": Tolerance(1e-4, 1e-5),
    "float16": _sixteen_bit(2.0**-11),
    "bfloat16": _sixteen_bit(2.0**-8),
}
# Two right forms of the delta rule in fp32, chunk by chunk and token by token, differ by up to 3e-4 in the logits: the
# state feeds roundoff back into itself, in any type. The op itself is held to 1e-5 of a recurrence in float64, by its
# own tests.
RECURRENT = 5.0
# In 16 bits a roundoff in a router's logits sends a token to other experts, and its numbers elsewhere: between two
# right runs of tiny models that is one token in a hundred to one in ten, and nearly one in two behind a delta rule
# (Qwen3.5-MoE in fp16: ONNX Runtime, which computes in fp32, differs from transformers there, and is the nearer to
# transformers in fp32). Half of the tokens must agree; that experts are chosen right is for fp32 to show.
STRAYS = 0.5


# The tokens of one step pass one router: between right runs one in a hundred to one in ten of them strays.
STEP_STRAYS = 0.2


def step_tolerance(dtype: str, step: Step | Part) -> Tolerance:
    """How far two runs of one step may differ, which read the same numbers."""
    routed = any(isinstance(part.block, Moe | MlpWithExperts) for part in parts(step))
    return dataclasses.replace(TOLERANCE[dtype], strays=STEP_STRAYS if routed and dtype != "float32" else 0.0)


def tolerance(dtype: str, model: Assembly | Export) -> Tolerance:
    """How far two runs of a whole model may differ."""
    return _tolerance(dtype, model.steps)


def tolerances(dtype: str, export: Export) -> dict[str, Tolerance]:
    """The same of each of its outputs: what sees chooses no experts, whatever reads its features."""
    found: dict[str, Tolerance] = {}
    steps: tuple[Step, ...] = ()
    for graph in export.graphs:
        steps += graph.assembly.steps
        found |= dict.fromkeys((p.name for p in graph.assembly.outputs), _tolerance(dtype, steps))
    return found


def _tolerance(dtype: str, steps: Iterable[Step]) -> Tolerance:
    blocks = [part.block for step in steps for part in parts(step)]
    recurrent, routed = (any(isinstance(b, kind) for b in blocks) for kind in (GatedDeltaNet, Moe | MlpWithExperts))
    base, factor = TOLERANCE[dtype], RECURRENT if recurrent else 1.0
    strays = STRAYS if routed and dtype != "float32" else 0.0
    return dataclasses.replace(base, max_abs=factor * base.max_abs, rms_ratio=factor * base.rms_ratio, strays=strays)
