"""What the configs of BERT and of those who followed it say in the same words, and the blocks that follow from it."""

from __future__ import annotations

from types import MappingProxyType

from llmexport.export.config import Config
from llmexport.export.decoder import PLAIN, head_size
from llmexport.export.spec import (
    Attention,
    BidirectionalMask,
    Embedding,
    Head,
    Layer,
    Mlp,
    Model,
    Norm,
    Sublayer,
)
from llmexport.export.stack import wired

# What the norms were called when the first checkpoints were published.
OLDER = MappingProxyType({"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"})

# What the built-in tiny configs share.
TINY = MappingProxyType(
    {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 320,
        "type_vocab_size": 3,
    }
)


def names(base: str) -> dict[str, str]:
    """The published names of BERT's body and of its like, which start with `base`."""
    layer = f"{base}encoder.layer.{{i}}."
    return {
        "embedding.": f"{base}embeddings.word_embeddings.",
        "embedding.types.": f"{base}embeddings.token_type_embeddings.",
        "embedding.positions.": f"{base}embeddings.position_embeddings.",
        "embedding.norm.": f"{base}embeddings.LayerNorm.",
        "layers.{i}.self_attn.q_proj.": f"{layer}attention.self.query.",
        "layers.{i}.self_attn.k_proj.": f"{layer}attention.self.key.",
        "layers.{i}.self_attn.v_proj.": f"{layer}attention.self.value.",
        "layers.{i}.self_attn.o_proj.": f"{layer}attention.output.dense.",
        "layers.{i}.self_attn_sum_norm.": f"{layer}attention.output.LayerNorm.",
        "layers.{i}.mlp.up_proj.": f"{layer}intermediate.dense.",
        "layers.{i}.mlp.down_proj.": f"{layer}output.dense.",
        "layers.{i}.mlp_sum_norm.": f"{layer}output.LayerNorm.",
    }


def post_norm(config: Config) -> Model:
    """An encoder whose layers norm their sums, with a head for masked tokens (modeling_bert.py)."""
    hidden, heads = config.length("hidden_size"), config.count("num_attention_heads")
    activation = config.choice("hidden_act", PLAIN, "gelu")
    normed = Norm(hidden, config.number("layer_norm_eps", 1e-12), statistics="layer", bias=True)
    attention = Attention(
        hidden, heads, heads, head_size(hidden, heads), qkv_bias=True, out_bias=True, rotated=0, cached=False
    )
    mlp = Mlp(hidden, config.length("intermediate_size"), activation, bias=True, gated=False)
    layer = Layer((Sublayer("self_attn", attention, sum_norm=normed), Sublayer("mlp", mlp, sum_norm=normed)))
    vocabulary = config.length("vocab_size")
    types, positions = config.length("type_vocab_size", 2), config.length("max_position_embeddings")
    embedding = Embedding(vocabulary, hidden, types=types, positions=positions, norm=normed)
    head = Head(normed, vocabulary, transform=activation, bias=True)
    layers = [(layer, (BidirectionalMask(),))] * config.count("num_hidden_layers")
    tied = config.flag("tie_word_embeddings", True)
    return wired(embedding, layers, head, tied=tied, static=config.static)
