"""What is added to the logits of attention, by how far a key is from a query."""

from __future__ import annotations

from dataclasses import dataclass

from llmexport.export.errors import ExportError
from llmexport.export.spec.axis import BATCH, SEQUENCE, SOURCE, TOTAL
from llmexport.export.spec.block import ATTENTION_MASK, INPUT_IDS, PADDING_LENGTH, PAST_LENGTH, Block, Port
from llmexport.export.spec.context import Keys


@dataclass(frozen=True)
class Alibi(Block):
    """ALiBi (arXiv 2108.12409): the slope of each head times how far a key is behind a query, and where the mask hides
    the key -32768, which is as far below all others in every dtype.

    The slopes of a power of two of heads are geometric; of other numbers they are those of the power below, then every
    other one of the power above (modeling_bloom.py, build_alibi_tensor): the short formula of the documents, which
    takes the number itself for a power, is wrong there. Distances count the tokens of a row and no padding.
    `rounded`: slopes, places and their products are rounded to bfloat16 before the query's is subtracted
    (modeling_falcon.py), which no softmax can tell from the key's alone. `scale` multiplies the difference. `keys`: of
    a static cache.
    """

    heads: int
    scale: float = 1.0
    rounded: bool = False
    keys: Keys | None = None

    def __post_init__(self) -> None:
        if self.keys and self.keys.slides:
            raise ValueError("ALiBi reads a whole cache")

    @property
    def inputs(self) -> tuple[Port, ...]:
        keys = self.keys.axis if self.keys else TOTAL
        where = (PADDING_LENGTH, PAST_LENGTH, INPUT_IDS) if self.keys else (ATTENTION_MASK, INPUT_IDS)
        return (*where, Port("mask", (BATCH, 1, SEQUENCE, keys), "bool", "mask"))

    @property
    def outputs(self) -> tuple[Port, ...]:
        keys = self.keys.axis if self.keys else TOTAL
        return (Port("bias", (BATCH, self.heads, SEQUENCE, keys), use="bias"),)


@dataclass(frozen=True)
class RelativeBias(Block):
    """T5's bias (arXiv 1910.10683): of each head a learned number for the bucket of the distance from a query to a key,
    and where the mask hides the key a number below all logits (modeling_t5.py).

    Half of the buckets are of one distance each, the others of ranges that grow up to `distance`, beyond which all is
    the last bucket. `both_ways`, in an encoder, half of all buckets are of keys behind the query and half of those
    before it; else keys behind it have none. Distances count slots, padding between two tokens too.
    """

    heads: int
    buckets: int
    distance: int
    both_ways: bool = False

    def __post_init__(self) -> None:
        if self.buckets < 4 or self.buckets % 2 or self.distance <= self.buckets // 2:
            raise ExportError(
                f"config.json: relative_attention_num_buckets is {self.buckets} and relative_attention_max_distance "
                f"{self.distance}: an even number of at least 4, and more than half of that, are expected"
            )

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (Port("mask", (BATCH, 1, *self._axes), "bool", "mask"),)

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (Port("bias", (BATCH, self.heads, *self._axes), use="bias"),)

    @property
    def _axes(self) -> tuple[str, str]:
        return (SOURCE, SOURCE) if self.both_ways else (SEQUENCE, TOTAL)
