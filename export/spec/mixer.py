"""Norms, and what mixes the tokens of a layer: attention, and the base of all that does."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from llmexport.export.errors import ExportError
from llmexport.export.spec.axis import BATCH, PAST, SEQUENCE, TOTAL, WRITTEN
from llmexport.export.spec.block import OPSET, PAST_LENGTH, Block, Dim, Port, State, Use, hidden, state
from llmexport.export.spec.context import Keys

SCATTER_OPSET = 24  # ai.onnx, which has TensorScatter


@dataclass(frozen=True)
class Norm(Block):
    """RMSNorm (arXiv 1910.07467) with statistics in fp32 and weight `offset + w`; or LayerNorm (arXiv 1607.06450),
    which may have a `bias`.

    `rounding` says where the result becomes the model's dtype: "before_weight" (Llama) or "after_weight"
    (Gemma, which multiplies in fp32). Without `weighted` there is no parameter. With `rows`, hidden states are
    [..., rows, size] and every row has a LayerNorm and a weight of its own (Command R+, modeling_cohere.py). `axes` are
    those of a batch and of tokens.
    """

    size: int
    epsilon: float
    offset: float = 0.0
    rounding: Literal["before_weight", "after_weight"] = "before_weight"
    statistics: Literal["rms", "layer"] = "rms"
    weighted: bool = True
    rows: int | None = None
    bias: bool = False
    axes: tuple[Dim, Dim] = (BATCH, SEQUENCE)

    def __post_init__(self) -> None:
        rows, layer = self.rows is not None, self.statistics == "layer"
        if ((rows or self.bias) and not layer) or (rows and (self.bias or not self.weighted)):
            raise ValueError("a norm with rows or a bias is a LayerNorm; one with rows has weights and no bias")

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (Port("hidden", (*self.axes, *self.shape)),)

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (Port("normed", (*self.axes, *self.shape)),)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight, and of the hidden states of a token."""
        return (self.size,) if self.rows is None else (self.rows, self.size)


@dataclass(frozen=True)
class Mixer(Block):
    """Base of what reads normed hidden states, `context` that layers share, and states. A decoder's layer calls it
    `sublayer`."""

    hidden: int
    sublayer: ClassVar[str] = "linear_attn"

    @property
    def along(self) -> tuple[Dim, Dim]:
        """The axes of rows and of tokens."""
        return (BATCH, SEQUENCE)

    @property
    def context(self) -> tuple[Port, ...]:
        raise NotImplementedError(self.kind)

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (hidden("normed", self.hidden, self.along), *self.context, *(s.past for s in self.states))

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (hidden("attended", self.hidden, self.along), *(s.present for s in self.states))


@dataclass(frozen=True)
class Attention(Mixer):
    """Self-attention with RoPE, grouped queries (arXiv 2305.13245) and a grown KV cache; unless `cached`, over the
    step's own tokens alone. With `keys` the cache is static: slots that are written in place, or the last ones alone.

    What a query may see is an input, the mask: layers that differ in their window alone are one block. With `sinks`
    or a `softcap` on the logits, it is the SinkAttention op, and its `window` (0: none) part of the block.

    The first `rotated` dimensions of a head turn (None: all, 0: none), pairwise interleaved or by halves; with
    `halves`, each half of a head by halves of its own (Rotary). `qk_norm` applies to every head of q and k, with one
    weight for all heads, one for each ("each_head") or over all at once ("all_heads", modeling_olmo2.py). `v_norm` is
    that of the values; `key_is_value`: they are what is projected for keys, before its norm (modeling_gemma4.py).
    `fused`: q, k and v are one matrix, one after the other; or, if `grouped`, group by group of the queries that share
    a key: queries, key, value (modeling_bloom.py, modeling_falcon.py). `transposed`: matrices are [in, out] (Conv1D,
    modeling_gpt2.py). `clip` bounds q, k and v. `biased`: in place of a mask it reads what is added to the logits, as
    ALiBi is.
    `output_gate`: the q projection holds, head by head, q and a gate whose sigmoid multiplies the head's output.
    `axes`, where it is not cached, are those of rows and of tokens; unless `masked`, a token sees all of its row.
    `borrows`: keys and values are an earlier layer's, as that sees them in this step, and it keeps none; `lends`: later
    layers read this one's (modeling_gemma4.py).
    `temperature` scales q. `scale` is that of the logits (None: head_size ** -0.5).
    """

    sublayer: ClassVar[str] = "self_attn"
    heads: int
    kv_heads: int
    head_size: int
    qkv_bias: bool = False
    out_bias: bool = False
    fused: bool = False
    grouped: bool = False
    transposed: bool = False
    rotated: int | None = None
    interleaved: bool = False
    halves: bool = False
    qk_norm: Norm | None = None
    qk_norm_over: Literal["head", "each_head", "all_heads"] = "head"
    qk_norm_place: Literal["before_rotary", "after_rotary"] = "before_rotary"
    v_norm: Norm | None = None
    key_is_value: bool = False
    clip: float | None = None
    scale: float | None = None
    temperature: bool = False
    output_gate: bool = False
    sinks: bool = False
    softcap: float = 0.0
    window: int = 0
    borrows: bool = False
    lends: bool = False
    cached: bool = True
    keys: Keys | None = None
    masked: bool = True
    biased: bool = False
    axes: tuple[Dim, Dim] = (BATCH, SEQUENCE)

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ExportError(f"{self.heads} attention heads are not a multiple of {self.kv_heads} key/value heads")
        if self.turned % 2 or self.turned > self.head_size:
            raise ExportError(
                f"RoPE needs an even head size, config.json makes it {self.turned} of {self.head_size} dimensions"
            )
        if self.cached and (not self.masked or self.axes != (BATCH, SEQUENCE)):
            raise ValueError("attention without a mask, or along axes of its own, has no cache")
        if (self.biased and (self.spans or not self.masked)) or (self.grouped and not self.fused):
            raise ValueError("only a mask can be a bias, and only a fused matrix be grouped")
        if self.key_is_value and self.fused:
            raise ValueError("a fused matrix has values of its own")
        if ((self.borrows or self.lends) and not self.cached) or (self.borrows and (self.lends or self.fused)):
            raise ValueError("only a cache is lent, and who borrows has nothing to lend and a matrix for q alone")

    @property
    def along(self) -> tuple[Dim, Dim]:
        return self.axes

    @property
    def turned(self) -> int:
        return self.head_size if self.rotated is None else self.rotated

    @property
    def spans(self) -> bool:
        """Whether visibility is a span of keys and not a mask."""
        return self.sinks or self.softcap > 0

    @property
    def context(self) -> tuple[Port, ...]:
        rows, tokens = self.axes
        angles = (rows, tokens, self.turned // 2)
        ports = [Port("cos", angles, use="cos"), Port("sin", angles, use="sin")] if self.turned else []
        if self.spans:
            ports.append(Port("start", (rows,), "int32", "span_start"))
            ports.append(Port("length", (rows,), "int32", "span_length"))
        elif self.masked:
            keys = self.keys.axis if self.keys else TOTAL if self.cached else tokens
            bias = Port("bias", (rows, self.heads, tokens, keys), use="bias")
            ports.append(bias if self.biased else Port("mask", (rows, 1, tokens, keys), "bool", "mask"))
        if self.temperature:
            ports.append(Port("temperature", (BATCH, SEQUENCE), "float32", "temperature"))
        if self.scatters:
            ports.append(PAST_LENGTH)
        return (*ports, *(self._seen if self.borrows else ()))

    @property
    def lent(self) -> tuple[Port, ...]:
        """What it gives of keys and values that later layers read, where that is not what it keeps."""
        return self._seen if self.lends and self.keys and self.keys.slides else ()

    @property
    def _seen(self) -> tuple[Port, Port]:
        """All keys and values that the step sees."""
        shape = (BATCH, self.kv_heads, self.keys.axis if self.keys else TOTAL, self.head_size)
        return Port("seen_key", shape, use="state"), Port("seen_value", shape, use="state")

    @property
    def outputs(self) -> tuple[Port, ...]:
        attended, *presents = super().outputs
        return (attended, *self.lent, *presents)

    @property
    def states(self) -> tuple[State, ...]:
        if not self.cached or self.borrows:
            return ()
        axes = (self.keys.slots,) * 2 if self.keys else (PAST, TOTAL)
        past, present = ((BATCH, self.kv_heads, axis, self.head_size) for axis in axes)
        use: Use = "state" if self.keys is None else "window" if self.keys.slides else "slots"
        return tuple(state(n, past, present, use=use) for n in ("key", "value"))

    @property
    def scatters(self) -> bool:
        """Whether it writes into its cache."""
        return self.keys is not None and not self.keys.slides and not self.borrows

    @property
    def opset(self) -> int:
        return SCATTER_OPSET if self.scatters else OPSET

    @property
    def most(self) -> Mapping[str, int]:
        if self.keys is None:
            return {}
        return {PAST: self.keys.slots} if self.keys.slides else dict.fromkeys((SEQUENCE, WRITTEN), self.keys.slots)

    @property
    def parts(self) -> Mapping[str, tuple[Block, str]]:
        return {name: (norm, f"{name}.") for name, norm in self.norms.items()}

    @property
    def spare(self) -> tuple[str, ...]:
        """Published checkpoints hold keys and values of layers that read another's."""
        own = {"k_proj": self.borrows, "v_proj": not self.key_is_value, "k_norm": self.qk_norm is not None}
        return tuple(f"{n}.weight" for n, there in own.items() if there and self.borrows)

    @property
    def norms(self) -> Mapping[str, Norm]:
        """The norms of q, of k and of v, if there are any."""
        heads = {"q_norm": self.heads} | ({} if self.borrows else {"k_norm": self.kv_heads})
        own = {name: self._norm_of(self.qk_norm, n) for name, n in heads.items()} if self.qk_norm else {}
        return own | ({"v_norm": self.v_norm} if self.v_norm and not self.borrows else {})

    def _norm_of(self, norm: Norm, heads: int) -> Norm:
        match self.qk_norm_over:
            case "each_head":
                return dataclasses.replace(norm, rows=heads)
            case "all_heads":
                return dataclasses.replace(norm, size=heads * self.head_size)
        return norm
