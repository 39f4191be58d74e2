"""BLOOM (transformers modeling_bloom.py): ALiBi, a norm on the embedding, LayerNorm, a plain MLP, fused q, k, v."""

from typing import Any

from llmexport.export.config import Config
from llmexport.export.decoder import head_size
from llmexport.export.spec import (
    Alibi,
    Arch,
    Attention,
    Embedding,
    Head,
    Layer,
    Mask,
    Mlp,
    Model,
    Norm,
    Sublayer,
    causal_lm,
)
from llmexport.export.stack import wired

# The published names of BLOOM's body, which Falcon's checkpoints have too.
LAYER = "transformer.h.{i}."
NAMES = {
    "embedding.": "transformer.word_embeddings.",
    "layers.{i}.self_attn_input_norm.": f"{LAYER}input_layernorm.",
    "layers.{i}.self_attn.qkv_proj.": f"{LAYER}self_attention.query_key_value.",
    "layers.{i}.self_attn.o_proj.": f"{LAYER}self_attention.dense.",
    "layers.{i}.mlp_input_norm.": f"{LAYER}post_attention_layernorm.",
    "layers.{i}.mlp.up_proj.": f"{LAYER}mlp.dense_h_to_4h.",
    "layers.{i}.mlp.down_proj.": f"{LAYER}mlp.dense_4h_to_h.",
    "head.norm.": "transformer.ln_f.",
    "head.projection.": "lm_head.",
}
# How the training code computed, which leaves the numbers alone, and lengths that bound nothing.
HARMLESS = (
    "attention_softmax_in_fp32",
    "bias_dropout_fusion",
    "masked_softmax_fusion",
    "offset_alibi",
    "seq_length",
    "skip_bias_add",
    "skip_bias_add_qkv",
    "slow_but_exact",
    "unk_token_id",
)


def build(config: Config) -> Model:
    config.leave(HARMLESS)
    hidden = config.length(config.either("hidden_size", "n_embed"))
    heads = config.count(config.either("n_head", "num_attention_heads"))
    layers = config.count(config.either("n_layer", "num_hidden_layers"))
    vocabulary = config.length("vocab_size")
    config.expect("n_inner", None, 4 * hidden)
    norm = Norm(hidden, config.number("layer_norm_epsilon", 1e-5), statistics="layer", bias=True)
    normed = config.flag("apply_residual_connection_post_layernorm")
    biases: dict[str, Any] = {"qkv_bias": True, "out_bias": True, "biased": True}
    attention = Attention(hidden, heads, heads, head_size(hidden, heads), fused=True, grouped=True, rotated=0, **biases)
    mlp = Mlp(hidden, 4 * hidden, "gelu_tanh", bias=True, gated=False)
    layer = Layer(tuple(Sublayer(n, b, norm, from_normed=normed) for n, b in (("self_attn", attention), ("mlp", mlp))))
    return wired(
        Embedding(vocabulary, hidden, norm=norm),
        [(layer, (Mask(), Alibi(heads)))] * layers,
        Head(norm, vocabulary),
        tied=config.flag("tie_word_embeddings", True),
        static=config.static,
    )


ARCH = Arch(
    model_types=("bloom",),
    system="BLOOM",
    adds="ALiBi, a norm on the embedding, LayerNorm with bias, plain MLP, q, k, v fused head by head",
    reference=causal_lm("BloomForCausalLM"),
    build=build,
    names={**NAMES, "embedding.norm.": "transformer.word_embeddings_layernorm."},
    base="transformer.",
    tiny={
        "vocab_size": 256,
        "hidden_size": 32,
        "n_layer": 3,
        "n_head": 4,
        "layer_norm_epsilon": 1e-5,
        "apply_residual_connection_post_layernorm": False,
        "tie_word_embeddings": True,
    },
)
