"""What a model is made of, as frozen data: blocks, the model built from them, and an architecture.

A block is a hashable value: equal blocks are traced once. Every block names its inputs and outputs as `Port`s,
whose symbolic dimensions are the dynamic axes of the exported graph. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from llmexport.export.errors import ExportError

if TYPE_CHECKING:
    from llmexport.export.config import Config

# The dynamic axes. `total` is past + sequence: what attention sees and the next step's past.
BATCH, SEQUENCE, PAST, TOTAL = "batch", "sequence", "past", "total"
OPSET = 23  # ai.onnx, of everything that is exported
DTYPES = ("float32", "float16", "bfloat16")
Dim = int | str


@dataclass(frozen=True)
class Port:
    """A named input or output of a block. `dtype` "T" is the dtype that the model is exported in."""

    name: str
    shape: tuple[Dim, ...]
    dtype: str = "T"


@dataclass(frozen=True)
class Block:
    """Base of all blocks; `kind` is the name of the class in snake case, and of `--block`."""

    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type[Block]]] = {}

    def __init_subclass__(cls) -> None:
        cls.kind = "".join("_" + c.lower() if c.isupper() else c for c in cls.__name__).lstrip("_")
        Block.kinds[cls.kind] = cls

    @property
    def inputs(self) -> tuple[Port, ...]:
        raise NotImplementedError(self.kind)

    @property
    def outputs(self) -> tuple[Port, ...]:
        raise NotImplementedError(self.kind)


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
class Embedding(Block):
    """Token embedding, times `scale` rounded to the model's dtype (modeling_gemma.py)."""

    vocabulary: int
    hidden: int
    scale: float = 1.0

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (Port("input_ids", (BATCH, SEQUENCE), "int64"),)

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (Port("hidden", (BATCH, SEQUENCE, self.hidden)),)


@dataclass(frozen=True)
class Rotary(Block):
    """cos and sin of RoPE (arXiv 2104.09864) for `size` rotated dimensions, from positions; fp32 inside."""

    size: int
    theta: float
    scaling: Llama3Scaling | LinearScaling | None = None

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (Port("position_ids", (BATCH, SEQUENCE), "int64"),)

    @property
    def outputs(self) -> tuple[Port, ...]:
        shape = (BATCH, SEQUENCE, self.size // 2)
        return (Port("cos", shape), Port("sin", shape))


@dataclass(frozen=True)
class Mask(Block):
    """Which of the `total` keys each query may see: causal by cache slot, no padding, the last `window`.

    A query always sees itself, so that the row of a padding token is never empty: no backend then makes a NaN.
    """

    window: int | None = None

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (
            Port("attention_mask", (BATCH, TOTAL), "int64"),
            Port("position_ids", (BATCH, SEQUENCE), "int64"),
        )

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (Port("mask", (BATCH, 1, SEQUENCE, TOTAL), "bool"),)


@dataclass(frozen=True)
class Norm(Block):
    """RMSNorm (arXiv 1910.07467) with statistics in fp32 and weight `offset + w`.

    `rounding` says where the result becomes the model's dtype: "before_weight" (Llama) or "after_weight"
    (Gemma, which multiplies in fp32).
    """

    size: int
    epsilon: float
    offset: float = 0.0
    rounding: Literal["before_weight", "after_weight"] = "before_weight"

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (Port("hidden", (BATCH, SEQUENCE, self.size)),)

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (Port("normed", (BATCH, SEQUENCE, self.size)),)


@dataclass(frozen=True)
class Attention(Block):
    """Self-attention with RoPE, grouped queries (arXiv 2305.13245) and a grown KV cache.

    What a query may see is an input, the mask: layers that differ in their window alone are one block.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    qkv_bias: bool = False
    out_bias: bool = False

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ExportError(f"{self.heads} attention heads are not a multiple of {self.kv_heads} key/value heads")
        if self.head_size % 2:
            raise ExportError(f"RoPE needs an even head size, config.json says {self.head_size}")

    @property
    def cache(self) -> tuple[Port, Port]:
        shape = (BATCH, self.kv_heads, PAST, self.head_size)
        return (Port("past_key", shape), Port("past_value", shape))

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (Port("normed", (BATCH, SEQUENCE, self.hidden)), *self.context)

    @property
    def context(self) -> tuple[Port, ...]:
        """What attention reads besides the hidden states."""
        angles = (BATCH, SEQUENCE, self.head_size // 2)
        mask = Port("mask", (BATCH, 1, SEQUENCE, TOTAL), "bool")
        return (Port("cos", angles), Port("sin", angles), mask, *self.cache)

    @property
    def present(self) -> tuple[Port, Port]:
        shape = (BATCH, self.kv_heads, TOTAL, self.head_size)
        return (Port("present_key", shape), Port("present_value", shape))

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (Port("attended", (BATCH, SEQUENCE, self.hidden)), *self.present)


@dataclass(frozen=True)
class Mlp(Block):
    """Gated MLP (arXiv 2002.05202): down(activation(gate(x)) * up(x))."""

    hidden: int
    intermediate: int
    activation: Literal["silu", "gelu_tanh", "gelu_erf"]
    bias: bool = False

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (Port("normed", (BATCH, SEQUENCE, self.hidden)),)

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (Port("mixed", (BATCH, SEQUENCE, self.hidden)),)


@dataclass(frozen=True)
class DecoderLayer(Block):
    """Pre-norm decoder layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    input_norm: Norm
    attention: Attention
    post_attention_norm: Norm
    mlp: Mlp

    @property
    def inputs(self) -> tuple[Port, ...]:
        hidden = Port("hidden", (BATCH, SEQUENCE, self.attention.hidden))
        return (hidden, *self.attention.context)

    @property
    def outputs(self) -> tuple[Port, ...]:
        hidden = Port("hidden_out", (BATCH, SEQUENCE, self.attention.hidden))
        return (hidden, *self.attention.present)


@dataclass(frozen=True)
class Head(Block):
    """Final norm and the projection to the vocabulary."""

    norm: Norm
    vocabulary: int

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (Port("hidden", (BATCH, SEQUENCE, self.norm.size)),)

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (Port("logits", (BATCH, SEQUENCE, self.vocabulary)),)


@dataclass(frozen=True)
class Model:
    """A decoder-only language model.

    `windows` has the attention window of every layer in tokens, None for the whole past. `tied`: the head's
    projection is the embedding table.
    """

    embedding: Embedding
    rotary: Rotary
    layers: tuple[DecoderLayer, ...]
    windows: tuple[int | None, ...]
    head: Head
    tied: bool


@dataclass(frozen=True)
class Arch:
    """One architecture: how its `config.json` reads, and what its checkpoint calls things.

    `names` maps the start of a parameter's path in our model (`embedding.`, `layers.{i}.`, `head.norm.`) to the
    start of its name in the checkpoint; the longest start that fits is taken. `ignore` are patterns (fnmatch) of
    tensors that a checkpoint may hold and the model does not need. `tiny` is the built-in config.
    """

    model_types: tuple[str, ...]
    causal_lm: str
    build: Callable[[Config], Model]
    names: Mapping[str, str]
    tiny: Mapping[str, Any]
    ignore: tuple[str, ...] = ()


def to_data(value: Any) -> Any:
    """A spec as JSON data, for the manifest and for cache keys."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: to_data(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"is": type(value).__name__, **fields}
    return [to_data(v) for v in value] if isinstance(value, tuple) else value


def from_data(data: Any) -> Any:
    """The spec that `to_data` wrote. Raises KeyError on a class that this version does not know."""
    if isinstance(data, dict):
        cls = _CLASSES[data["is"]]
        return cls(**{k: from_data(v) for k, v in data.items() if k != "is"})
    return tuple(from_data(v) for v in data) if isinstance(data, list) else data


_CLASSES: dict[str, Any] = {c.__name__: c for c in (*Block.kinds.values(), Llama3Scaling, LinearScaling, Port)}
