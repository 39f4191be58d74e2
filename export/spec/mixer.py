"""Norms, and what mixes the tokens of a layer: attention and the gated delta net."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from llmexport.export.errors import ExportError
from llmexport.export.spec.block import BATCH, PAST, SEQUENCE, TOTAL, Block, Port, hidden


@dataclass(frozen=True)
class Norm(Block):
    """RMSNorm (arXiv 1910.07467) with statistics in fp32 and weight `offset + w`; or LayerNorm (arXiv 1607.06450).

    `rounding` says where the result becomes the model's dtype: "before_weight" (Llama) or "after_weight"
    (Gemma, which multiplies in fp32). Without `weighted` there is no parameter.
    """

    size: int
    epsilon: float
    offset: float = 0.0
    rounding: Literal["before_weight", "after_weight"] = "before_weight"
    statistics: Literal["rms", "layer"] = "rms"
    weighted: bool = True

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (hidden("hidden", self.size),)

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (hidden("normed", self.size),)


@dataclass(frozen=True)
class Mixer(Block):
    """Base of what reads normed hidden states, `context` that layers share and a cache, and grows the cache.

    Every port `past_<what>` of the cache has a `present_<what>` among the outputs.
    """

    hidden: int

    @property
    def context(self) -> tuple[Port, ...]:
        raise NotImplementedError(self.kind)

    @property
    def cache(self) -> tuple[Port, ...]:
        raise NotImplementedError(self.kind)

    @property
    def present(self) -> tuple[Port, ...]:
        raise NotImplementedError(self.kind)

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (hidden("normed", self.hidden), *self.context, *self.cache)

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (hidden("attended", self.hidden), *self.present)


@dataclass(frozen=True)
class Attention(Mixer):
    """Self-attention with RoPE, grouped queries (arXiv 2305.13245) and a grown KV cache.

    What a query may see is an input, the mask: layers that differ in their window alone are one block. With `sinks`
    or a `softcap` on the logits, it is the SinkAttention op, and its `window` (0: none) part of the block.

    The first `rotated` dimensions of a head turn (None: all, 0: none), pairwise interleaved or by halves.
    `qk_norm` applies to every head of q and k. `fused`: q, k and v are one matrix. `clip` bounds q, k and v.
    `output_gate`: the q projection holds, head by head, q and a gate whose sigmoid multiplies the head's output.
    `temperature` scales q. `scale` is that of the logits (None: head_size ** -0.5).
    """

    heads: int
    kv_heads: int
    head_size: int
    qkv_bias: bool = False
    out_bias: bool = False
    fused: bool = False
    rotated: int | None = None
    interleaved: bool = False
    qk_norm: Norm | None = None
    qk_norm_place: Literal["before_rotary", "after_rotary"] = "before_rotary"
    clip: float | None = None
    scale: float | None = None
    temperature: bool = False
    output_gate: bool = False
    sinks: bool = False
    softcap: float = 0.0
    window: int = 0

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ExportError(f"{self.heads} attention heads are not a multiple of {self.kv_heads} key/value heads")
        if self.turned % 2 or self.turned > self.head_size:
            raise ExportError(
                f"RoPE needs an even head size, config.json makes it {self.turned} of {self.head_size} dimensions"
            )

    @property
    def turned(self) -> int:
        return self.head_size if self.rotated is None else self.rotated

    @property
    def spans(self) -> bool:
        """Whether visibility is a span of keys and not a mask."""
        return self.sinks or self.softcap > 0

    @property
    def context(self) -> tuple[Port, ...]:
        angles = (BATCH, SEQUENCE, self.turned // 2)
        ports = [Port("cos", angles), Port("sin", angles)] if self.turned else []
        if self.spans:
            ports += [Port("start", (BATCH,), "int32"), Port("length", (BATCH,), "int32")]
        else:
            ports.append(Port("mask", (BATCH, 1, SEQUENCE, TOTAL), "bool"))
        return (*ports, Port("temperature", (BATCH, SEQUENCE), "float32")) if self.temperature else tuple(ports)

    @property
    def cache(self) -> tuple[Port, ...]:
        shape = (BATCH, self.kv_heads, PAST, self.head_size)
        return (Port("past_key", shape), Port("past_value", shape))

    @property
    def present(self) -> tuple[Port, ...]:
        shape = (BATCH, self.kv_heads, TOTAL, self.head_size)
        return (Port("present_key", shape), Port("present_value", shape))

    @property
    def parts(self) -> Mapping[str, tuple[Block, str]]:
        return {"qk_norm": (self.qk_norm, "q_norm.")} if self.qk_norm else {}


@dataclass(frozen=True)
class CausalConv(Block):
    """Depthwise causal convolution over `kernel` tokens, then SiLU; its state is the last kernel - 1 inputs."""

    channels: int
    kernel: int

    @property
    def inputs(self) -> tuple[Port, ...]:
        return (hidden("mixed", self.channels), self.state("past_conv_state"))

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (hidden("convolved", self.channels), self.state("present_conv_state"))

    def state(self, name: str) -> Port:
        return Port(name, (BATCH, self.kernel - 1, self.channels))


@dataclass(frozen=True)
class GatedNorm(Block):
    """RMSNorm of every head times the SiLU of a gate (modeling_qwen3_5_moe.py, RMSNormGated)."""

    heads: int
    size: int
    epsilon: float

    @property
    def inputs(self) -> tuple[Port, ...]:
        shape = (BATCH, SEQUENCE, self.heads, self.size)
        return (Port("recalled", shape), Port("gate", shape))

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (Port("normed", (BATCH, SEQUENCE, self.heads, self.size)),)


@dataclass(frozen=True)
class GatedDeltaNet(Mixer):
    """Linear attention by the gated delta rule behind a short convolution (arXiv 2412.06464).

    q and k have `key_heads` of `key_size`, v `value_heads` of `value_size`; the recurrent state is fp32.
    """

    key_heads: int
    key_size: int
    value_heads: int
    value_size: int
    kernel: int
    epsilon: float

    def __post_init__(self) -> None:
        if self.value_heads % self.key_heads:
            raise ExportError(f"{self.value_heads} value heads are not a multiple of {self.key_heads} key heads")

    @property
    def convolution(self) -> CausalConv:
        return CausalConv(2 * self.key_heads * self.key_size + self.value_heads * self.value_size, self.kernel)

    @property
    def norm(self) -> GatedNorm:
        return GatedNorm(self.value_heads, self.value_size, self.epsilon)

    @property
    def context(self) -> tuple[Port, ...]:
        return (Port("present_tokens", (BATCH, SEQUENCE)), Port("tokens_end", (BATCH,), "int64"))

    @property
    def cache(self) -> tuple[Port, ...]:
        return (self.convolution.state("past_conv_state"), self._state("past_recurrent_state"))

    @property
    def present(self) -> tuple[Port, ...]:
        return (self.convolution.state("present_conv_state"), self._state("present_recurrent_state"))

    @property
    def parts(self) -> Mapping[str, tuple[Block, str]]:
        return {"convolution": (self.convolution, "conv1d."), "norm": (self.norm, "norm.")}

    def _state(self, name: str) -> Port:
        return Port(name, (BATCH, self.value_heads, self.key_size, self.value_size), "float32")
