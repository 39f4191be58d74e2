"""What the configs of all decoders say in the same words, and the blocks that follow from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from llmexport.export.config import Config
from llmexport.export.errors import ExportError
from llmexport.export.spec import (
    Activation,
    Attention,
    Block,
    Embedding,
    Head,
    Layer,
    Mask,
    Mlp,
    Model,
    Norm,
    PerLayerEmbedding,
)
from llmexport.export.stack import wired

# The published names of Llama and of all who followed it.
NAMES = MappingProxyType(
    {
        "embedding.": "model.embed_tokens.",
        "layers.{i}.": "model.layers.{i}.",
        "layers.{i}.self_attn_input_norm.": "model.layers.{i}.input_layernorm.",
        "layers.{i}.linear_attn_input_norm.": "model.layers.{i}.input_layernorm.",
        "layers.{i}.mlp_input_norm.": "model.layers.{i}.post_attention_layernorm.",
        "head.norm.": "model.norm.",
        "head.projection.": "lm_head.",
    }
)

# Buffers that old checkpoints carry and that follow from the config.
BUFFERS = ("model.layers.*.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")

# What a module that guesses the token after the next has beside a layer of its own (DeepSeek V3, section 2.2).
AHEAD = tuple(
    f"model.layers.{{layers}}.{n}.weight"
    for n in ("eh_proj", "enorm", "hnorm", "embed_tokens", "shared_head.norm", "shared_head.head")
)

# What the built-in tiny configs share.
TINY = MappingProxyType(
    {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
    }
)

ACTIVATIONS = MappingProxyType({"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu_erf"})
# Those of MLPs without a gate.
PLAIN = MappingProxyType(
    {**ACTIVATIONS, "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "relu": "relu", "relu2": "relu2"}
)


@dataclass(frozen=True)
class Decoder:
    """The sizes of a decoder, and its parts; `fields` are those of the spec that an architecture sets."""

    config: Config
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    layers: int
    vocabulary: int

    def norm(self, epsilon: float | None = None, **fields: Any) -> Norm:
        """`epsilon` is for configs that do not say."""
        return Norm(self.hidden, self.config.number("rms_norm_eps", epsilon or 1e-6), **fields)

    def attention(self, **fields: Any) -> Attention:
        return Attention(self.hidden, self.heads, self.kv_heads, self.head_size, **fields)

    def mlp(self, intermediate: int | None = None, activation: Activation | None = None, **fields: Any) -> Mlp:
        """By default of the sizes and the activation that the config names."""
        intermediate = intermediate or self.config.length("intermediate_size")
        return Mlp(self.hidden, intermediate, activation or self.activation(), **fields)

    def activation(self) -> Activation:
        return self.config.choice("hidden_act", ACTIVATIONS, "silu")

    def model(
        self,
        layers: Iterable[tuple[Layer, tuple[Block, ...]]],
        norm: Norm,
        *,
        tied: bool,
        scale: float = 1.0,
        softcap: float = 0.0,
        logit_scale: float = 1.0,
        head_bias: bool = False,
        normed: bool = False,
        told: PerLayerEmbedding | None = None,
    ) -> Model:
        """`layers` are the blocks and what each reads; `tied` is for configs that do not say."""
        embedding = Embedding(self.vocabulary, self.hidden, scale)
        layers = list(layers)
        self.config.expect_layer_types([_kind(reads) for _, reads in layers])
        head = Head(norm, self.vocabulary, softcap, logit_scale, bias=head_bias, normed=normed)
        tied = self.config.flag("tie_word_embeddings", tied)
        static, splice = self.config.static, self.config.splice
        return wired(embedding, layers, head, tied=tied, static=static, splice=splice, told=told)


def head_size(hidden: int, heads: int, key: str = "hidden_size") -> int:
    """The size of the heads of a model that shares its hidden size among them; `key` is what says that."""
    if hidden % heads:
        raise ExportError(f"config.json: {key} {hidden} is not a multiple of {heads} attention heads")
    return hidden // heads


def _kind(reads: Iterable[Block]) -> str:
    """What layer_types call a layer that reads these blocks."""
    slides = any(isinstance(b, Mask) and b.window for b in reads)
    return "sliding_attention" if slides else "full_attention"


def decoder(config: Config, head_size: int | None = None, *, grouped: bool = True) -> Decoder:
    """Reads the sizes.

    `head_size` is for configs that do not say; without, the heads share the hidden size. Unless keys are `grouped`
    in all models of the family, a config that does not say has one for each head.
    """
    hidden, heads = config.length("hidden_size"), config.count("num_attention_heads")
    says_keys, says_size = config.has("num_key_value_heads"), config.has("head_dim")
    return Decoder(
        config,
        hidden,
        heads,
        config.count("num_key_value_heads") if grouped or says_keys else heads,
        config.length("head_dim", head_size) if head_size or says_size else hidden // heads,
        config.count("num_hidden_layers"),
        config.length("vocab_size"),
    )


def stacks(
    moe: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> dict[str, tuple[str, ...]]:
    """An Arch's `stacks` for experts that a checkpoint has one by one behind `moe`, by the names of their matrices."""
    each = f"{moe}experts.{{e}}."
    return {
        f"{moe}experts.gate_up_proj": (f"{each}{gate}.weight", f"{each}{up}.weight"),
        f"{moe}experts.down_proj": (f"{each}{down}.weight",),
    }
