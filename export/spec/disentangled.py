"""Disentangled attention (arXiv 2006.03654): what a token says and how far it is from another have vectors apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmexport.export.spec.axis import SEQUENCE
from llmexport.export.spec.block import INPUT_IDS, STEP_MASK, Block, Port
from llmexport.export.spec.mixer import Mixer, Norm


def relative(span: int, hidden: int) -> Port:
    """A vector for each distance of a query from a key."""
    return Port("relative", (2 * span, hidden), use="relative")


def distances(span: int) -> Port:
    """Which of the vectors each pair of a query and a key takes."""
    return Port("apart", (SEQUENCE, SEQUENCE), "int64", "distances")


@dataclass(frozen=True)
class RelativePositions(Block):
    """A table with 2 * `span` vectors, and the row of it that a query at i and a key at j take: i - j + span, the
    nearest there is.

    If `most_apart` is not 0, distances from span / 2 on share rows, ever more of them, those from `most_apart` on the
    last one (modeling_deberta_v2.py, make_log_bucket_position). The vectors may have a `norm`.
    """

    span: int
    hidden: int
    most_apart: int = 0
    norm: Norm | None = None

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (INPUT_IDS,)

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (relative(self.span, self.hidden), distances(self.span))

    @property
    def parts(self) -> Mapping[str, tuple[Block, str]]:
        return {"norm": (self.norm, "norm.")} if self.norm else {}


@dataclass(frozen=True)
class DisentangledAttention(Mixer):
    """Attention over a row without a cache, whose logits are, all times `scale`: what a query and a key say of each
    other, and what their distance says of the query (`to_position`, c2p there) and of the key (`from_position`, p2c).

    `span` is that of RelativePositions. Distances have matrices of their own, or, if these are `shared`, those of
    queries and keys. `fused`: q, k and v are one matrix without bias, head by head, and q and v have biases beside it
    (modeling_deberta.py). Padding sees all of its row alike, as there.
    """

    heads: int
    head_size: int
    span: int
    scale: float
    to_position: bool = True
    from_position: bool = True
    shared: bool = False
    fused: bool = False

    @property
    def context(self) -> tuple[Port, ...]:
        places = (relative(self.span, self.hidden), distances(self.span)) if self.placed else ()
        return (*places, STEP_MASK)

    @property
    def placed(self) -> bool:
        """Whether it reads distances."""
        return self.to_position or self.from_position
