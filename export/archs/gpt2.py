"""GPT-2 (transformers modeling_gpt2.py): learned positions, LayerNorms before attention and MLP, matrices [in, out]."""

from typing import Any

from llmexport.export.config import Config
from llmexport.export.decoder import PLAIN, head_size
from llmexport.export.spec import Arch, Attention, Embedding, Head, Mask, Mlp, Model, Norm, causal_lm, decoder_layer
from llmexport.export.stack import wired

# Of all but attention, here and in GPT-Neo.
NAMES = {
    "embedding.": "transformer.wte.",
    "embedding.positions.": "transformer.wpe.",
    "layers.{i}.self_attn_input_norm.": "transformer.h.{i}.ln_1.",
    "layers.{i}.mlp_input_norm.": "transformer.h.{i}.ln_2.",
    "layers.{i}.mlp.up_proj.": "transformer.h.{i}.mlp.c_fc.",
    "layers.{i}.mlp.down_proj.": "transformer.h.{i}.mlp.c_proj.",
    "head.norm.": "transformer.ln_f.",
    "head.projection.": "lm_head.",
}


def build(config: Config) -> Model:
    hidden, heads, positions = config.length("n_embd"), config.count("n_head"), config.length("n_positions")
    config.expect("max_position_embeddings", positions)
    config.expect("add_cross_attention", False)
    # The side of a mask that old checkpoints store, and 32 bits for logits, which every graph here has.
    config.get("n_ctx", None)
    config.flag("reorder_and_upcast_attn")
    norm = Norm(hidden, config.number("layer_norm_epsilon", 1e-5), statistics="layer", bias=True)
    inner = config.length("n_inner") if config.has("n_inner") else 4 * hidden
    activation = config.choice("activation_function", PLAIN, "gelu_new")
    mlp = Mlp(hidden, inner, activation, bias=True, gated=False, transposed=True)
    size, by_layer = head_size(hidden, heads, "n_embd"), config.flag("scale_attn_by_inverse_layer_idx")
    scale = size**-0.5 if config.flag("scale_attn_weights", True) else 1.0

    def attention(layer: int) -> Attention:
        own = scale / (layer + 1) if by_layer else scale
        fields: dict[str, Any] = {"qkv_bias": True, "out_bias": True, "fused": True, "transposed": True, "rotated": 0}
        return Attention(hidden, heads, heads, size, scale=own, **fields)

    layers = [(decoder_layer(norm, attention(i), norm, mlp), (Mask(),)) for i in range(config.count("n_layer"))]
    vocabulary, tied = config.length("vocab_size"), config.flag("tie_word_embeddings", True)
    embedding = Embedding(vocabulary, hidden, positions=positions, offset=0)
    return wired(embedding, layers, Head(norm, vocabulary), tied=tied, static=config.static)


ARCH = Arch(
    model_types=("gpt2",),
    system="GPT-2",
    adds="learned positions, LayerNorms with a bias, a plain MLP, fused matrices [in, out]",
    reference=causal_lm("GPT2LMHeadModel"),
    build=build,
    names={
        **NAMES,
        "layers.{i}.self_attn.qkv_proj.": "transformer.h.{i}.attn.c_attn.",
        "layers.{i}.self_attn.o_proj.": "transformer.h.{i}.attn.c_proj.",
    },
    base="transformer.",
    # The mask, and what it fills with.
    ignore=("transformer.h.*.attn.bias", "transformer.h.*.attn.masked_bias"),
    tiny={
        "vocab_size": 256,
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 512,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
)
