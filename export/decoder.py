"""The decoder that most architectures are: every layer alike but for its attention window."""

from __future__ import annotations

from types import MappingProxyType
from typing import Literal

from llmexport.export.config import Config
from llmexport.export.spec import Attention, DecoderLayer, Embedding, Head, Mlp, Model, Norm, Rotary

# The published names of Llama and of all who followed it.
NAMES = MappingProxyType(
    {
        "embedding.": "model.embed_tokens.",
        "layers.{i}.": "model.layers.{i}.",
        "head.norm.": "model.norm.",
        "head.projection.": "lm_head.",
    }
)

# Buffers that old checkpoints carry and that follow from the config.
BUFFERS = ("model.layers.*.self_attn.rotary_emb.inv_freq",)

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


def decoder(
    config: Config,
    *,
    activation: Literal["silu", "gelu_tanh", "gelu_erf"],
    tied: bool,
    head_size: int | None = None,
    norm_offset: float = 0.0,
    norm_rounding: Literal["before_weight", "after_weight"] = "before_weight",
    scale_embedding: bool = False,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    windows: tuple[int | None, ...] | None = None,
) -> Model:
    """Reads the keys that all such configs share; the arguments are what distinguishes an architecture.

    `tied` and `head_size` are for configs that do not say. `windows` holds the attention window of
    every layer, None for the whole past.
    """
    hidden = config.integer("hidden_size")
    heads = config.integer("num_attention_heads")
    layers = config.integer("num_hidden_layers")
    vocabulary = config.integer("vocab_size")
    norm = Norm(hidden, config.number("rms_norm_eps", 1e-6), norm_offset, norm_rounding)
    head_size = config.integer("head_dim", head_size or hidden // heads)
    theta, scaling = config.rope(10000.0)
    kv_heads = config.integer("num_key_value_heads", heads)
    mlp = Mlp(hidden, config.integer("intermediate_size"), activation, mlp_bias)

    attention = Attention(hidden, heads, kv_heads, head_size, qkv_bias, out_bias)
    return Model(
        embedding=Embedding(vocabulary, hidden, hidden**0.5 if scale_embedding else 1.0),
        rotary=Rotary(head_size, theta, scaling),
        layers=(DecoderLayer(norm, attention, norm, mlp),) * layers,
        windows=windows or (None,) * layers,
        head=Head(norm, vocabulary),
        tied=config.flag("tie_word_embeddings", tied),
    )
