"""What all layers of a model read besides the hidden states: angles, masks, spans, temperatures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from llmexport.export.errors import ExportError
from llmexport.export.spec.axis import BATCH, PAST, SEQUENCE, TOTAL, WRITTEN, behind
from llmexport.export.spec.block import (
    ATTENTION_MASK,
    INPUT_IDS,
    PADDING_LENGTH,
    PAST_LENGTH,
    PICTURES,
    PLACES,
    POSITION_IDS,
    PRESENCE,
    SHOWN,
    SLOT_MASK,
    Block,
    Dim,
    Port,
)
from llmexport.export.spec.proportional import ProportionalScaling


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's stretch of RoPE's low frequencies (transformers modeling_rope_utils.py)."""

    factor: float
    low_frequency: float
    high_frequency: float
    original_positions: int


@dataclass(frozen=True)
class LinearScaling:
    """Positions divided by `factor` (position interpolation, arXiv 2306.15595)."""

    factor: float


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): low frequencies divided by `factor`, high ones kept, a linear ramp between.

    `fast` and `slow` are the rotations over `original_positions` that bound the ramp; `truncate` rounds its ends to
    whole dimensions. cos and sin are multiplied by `magnitude`.
    """

    factor: float
    original_positions: int
    fast: float
    slow: float
    truncate: bool
    magnitude: float


@dataclass(frozen=True)
class LongScaling:
    """LongRoPE (arXiv 2402.13753): a divisor for each frequency, `long` once a position is `original_positions`
    or beyond, else `short`; keys cached before that point keep their angles, so that who crosses it must run the
    whole prompt again, as transformers' generate does. cos and sin are multiplied by `magnitude`, or beside `long` by
    `long_magnitude` if there is one."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_positions: int
    magnitude: float
    long_magnitude: float | None = None


@dataclass(frozen=True)
class DynamicScaling:
    """NTK-aware RoPE (transformers modeling_rope_utils.py, _compute_dynamic_ntk_parameters): once the last position of
    a step is `original_positions` or beyond, its tokens turn by a base that grows with that position. Keys that are
    cached keep their angles, so that a prompt in two steps gives other logits than one in one, there as here."""

    factor: float
    original_positions: int


Scaling: TypeAlias = Llama3Scaling | LinearScaling | YarnScaling | LongScaling | ProportionalScaling | DynamicScaling


@dataclass(frozen=True)
class Rotary(Block):
    """cos and sin of RoPE (arXiv 2104.09864) for `size` rotated dimensions, from positions; fp32 inside.

    With `sections`, each token has as many positions (time, height, width: mRoPE, arXiv 2409.12191), equal for
    text. Frequency i turns by position i mod 3 as long as i < 3 * sections[i mod 3], by the first one otherwise
    (modeling_qwen3_5_moe.py). `places`: how many positions these angles are right for, where a model has others beyond.
    `halves`: a head has two, each turned by a place of its own as a head of that size is (modeling_chatglm.py).
    """

    size: int
    theta: float
    scaling: Scaling | None = None
    sections: tuple[int, ...] = ()
    places: int | None = None
    halves: bool = False

    def __post_init__(self) -> None:
        if self.size % (4 if self.halves else 2) or not self.size:
            raise ExportError(f"RoPE needs an even number of dimensions above 0, config.json makes it {self.size}")
        if self.size == 2 and isinstance(self.scaling, DynamicScaling):
            raise ExportError("RoPE of type dynamic needs 4 dimensions or more, config.json makes it 2")
        if self.sections and (len(self.sections) != 3 or sum(self.sections) != self.size // 2):
            raise ExportError(f"mrope_section is {list(self.sections)}: 3 numbers of sum {self.size // 2} are expected")

    @property
    def inputs(self) -> tuple[Port, ...]:
        if self.halves:
            return (PLACES,)
        axes = (len(self.sections),) if self.sections else ()
        return (Port("position_ids", (*axes, BATCH, SEQUENCE), "int64", "positions"),)

    @property
    def outputs(self) -> tuple[Port, ...]:
        shape = (BATCH, SEQUENCE, self.size // 2)
        return (Port("cos", shape, use="cos"), Port("sin", shape, use="sin"))

    @property
    def most(self) -> Mapping[str, int]:
        return {SEQUENCE: self.places, PAST: self.places - 1} if self.places else {}


@dataclass(frozen=True)
class Slots(Block):
    """Where a step stands in a static cache of so many `slots`: how many of a row are padding before its first token,
    and how many were written before the step.

    A row's tokens of the step end where its mask has the last 1: what is behind that is not written yet. Padding is on
    the left: with padding behind a token, or behind all of a prompt, a run fails in PyTorch and in ONNX Runtime;
    TensorRT does not tell. Behind a later step's tokens nobody can tell padding from slots that are not written.
    """

    slots: int

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (SLOT_MASK, INPUT_IDS)

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (PADDING_LENGTH, PAST_LENGTH)

    @property
    def most(self) -> Mapping[str, int]:
        return {SEQUENCE: self.slots, WRITTEN: self.slots}


@dataclass(frozen=True)
class Keys:
    """What attention of a static cache reads: `slots` of the cache, or with `slides` so many last ones, and the step's
    own behind them."""

    slots: int
    slides: bool = False

    @property
    def axis(self) -> Dim:
        return behind(self.slots) if self.slides else self.slots

    @property
    def label(self) -> str:
        return f"_last_{self.slots}" if self.slides else ""


@dataclass(frozen=True)
class Mask(Block):
    """Which of the `total` keys each query may see: causal by cache slot, no padding, the last `window`, its own
    `chunk` of that many.

    Windows and chunks count the tokens of a row and no padding, wherever it stands, so that a row in a batch sees
    what it sees alone. A query always sees itself, so that the row of a padding token is never empty: no backend
    then makes a NaN. `keys`: of a static cache. `pictures`: the tokens of a picture see each other as well, as far as
    they are of this step, those behind a query too; a window bounds what is before it (modeling_gemma3.py,
    create_masks_for_vision_model). `prefixed`, of texts alone: some tokens of a step are seen by all of it.
    """

    window: int | None = None
    chunk: int | None = None
    keys: Keys | None = None
    pictures: bool = False
    prefixed: bool = False

    @property
    def inputs(self) -> tuple[Port, ...]:
        ports = (PADDING_LENGTH, PAST_LENGTH, INPUT_IDS) if self.keys else (ATTENTION_MASK, INPUT_IDS)
        return (*ports, *(PICTURES,) * self.pictures, *(SHOWN,) * self.prefixed)

    @property
    def outputs(self) -> tuple[Port, ...]:
        keys = self.keys.axis if self.keys else TOTAL
        return (Port("mask", (BATCH, 1, SEQUENCE, keys), "bool", "mask"),)

    @property
    def label(self) -> str:
        window = "" if self.window is None else f"_window_{self.window}"
        return self.kind + window + ("" if self.chunk is None else f"_chunk_{self.chunk}")


@dataclass(frozen=True)
class BidirectionalMask(Block):
    """Every token sees all tokens of its row and no padding, and padding sees the same (masking_utils.py,
    create_bidirectional_mask). A row that is all padding sees all of it, so that no backend makes a NaN. `tokens` is
    the axis along which they lie."""

    tokens: Dim = SEQUENCE

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (Port("attention_mask", (BATCH, self.tokens), "int64", "padding"),)

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (Port("mask", (BATCH, 1, self.tokens, self.tokens), "bool", "mask"),)


@dataclass(frozen=True)
class Span(Block):
    """Where the keys of each row begin and end, for attention without a dense mask.

    Padding is on the left, or after all tokens of the row: with a token behind padding that is behind a token, a run
    fails in PyTorch and in ONNX Runtime; TensorRT does not tell. `keys`: of a static cache.
    """

    keys: Keys | None = None

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (PADDING_LENGTH, PAST_LENGTH, INPUT_IDS) if self.keys else (ATTENTION_MASK,)

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (Port("start", (BATCH,), "int32", "span_start"), Port("length", (BATCH,), "int32", "span_length"))

    @property
    def label(self) -> str:
        return self.kind + (self.keys.label if self.keys else "")


@dataclass(frozen=True)
class Temperature(Block):
    """1 + scale * log(1 + floor((p + 1) / interval)) for every query, which its logits are multiplied by (arXiv
    2501.19399, modeling_llama4.py). Of the row's cache slots up to the query's, p + 1 are tokens or padding before
    the first of them, which counts there; padding further right does not, as a row alone has none. `static`: of a
    static cache. `placed`: p + 1 is the query's position instead (modeling_ministral3.py)."""

    interval: int
    scale: float
    static: bool = False
    placed: bool = False

    @property
    def inputs(self) -> tuple[Port, ...]:
        if self.placed:
            return (POSITION_IDS,)
        return (PADDING_LENGTH, PAST_LENGTH, INPUT_IDS) if self.static else (ATTENTION_MASK, INPUT_IDS)

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (Port("temperature", (BATCH, SEQUENCE), "float32", "temperature"),)


@dataclass(frozen=True)
class Presence(Block):
    """1 for the tokens of this step, 0 for padding: layers with a recurrent state must not see padding. And where in
    the step a row's tokens end: behind its last one, at 0 without any.

    Padding is before or after a row's tokens of this step, before them only where the row has none yet: else a run
    fails as Span's does. `static`: of a static cache, whose padding is on the left.
    """

    static: bool = False

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (PADDING_LENGTH, PAST_LENGTH, INPUT_IDS) if self.static else (ATTENTION_MASK, INPUT_IDS)

    @property
    def outputs(self) -> tuple[Port, ...]:
        return PRESENCE
