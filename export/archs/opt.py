"""OPT and Galactica (transformers modeling_opt.py): learned positions behind two unused rows, an MLP of ReLU.

The layers of OPT-350m norm their sums, and its words are narrower than its hidden states.
"""

from llmexport.export.config import Config
from llmexport.export.decoder import PLAIN, head_size
from llmexport.export.spec import (
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
    decoder_layer,
)
from llmexport.export.stack import wired

OFFSET = 2  # rows of the table of positions before the first one's


def build(config: Config) -> Model:
    hidden, heads = config.length("hidden_size"), config.count("num_attention_heads")
    # Galactica says them, and transformers knows no others.
    config.expect("learned_embeddings", True)
    config.expect("scale_embeddings", False)
    bias, affine = config.flag("enable_bias", True), config.flag("layer_norm_elementwise_affine", True)
    first, last = config.flag("do_layer_norm_before", True), not config.flag("_remove_final_layer_norm", False)
    norm = Norm(hidden, 1e-5, statistics="layer", weighted=affine, bias=affine)
    attention = Attention(hidden, heads, heads, head_size(hidden, heads), qkv_bias=bias, out_bias=bias, rotated=0)
    activation = config.choice("activation_function", PLAIN, "relu")
    mlp = Mlp(hidden, config.length("ffn_dim"), activation, bias=bias, gated=False)
    if first:
        layer = decoder_layer(norm, attention, norm, mlp)
    else:
        layer = Layer((Sublayer("self_attn", attention, sum_norm=norm), Sublayer("mlp", mlp, sum_norm=norm)))
    width = config.length("word_embed_proj_dim") if config.has("word_embed_proj_dim") else hidden
    inner = width if width != hidden else 0
    vocabulary, positions = config.length("vocab_size"), config.length("max_position_embeddings") + OFFSET
    return wired(
        Embedding(vocabulary, hidden, positions=positions, offset=OFFSET, inner=inner),
        [(layer, (Mask(),))] * config.count("num_hidden_layers"),
        Head(norm if first and last else None, vocabulary, hidden=hidden, inner=inner),
        tied=config.flag("tie_word_embeddings", True),
        static=config.static,
    )


LAYER = "model.decoder.layers.{i}."
ARCH = Arch(
    model_types=("opt",),
    adds="learned positions behind an offset, ReLU; norms on sums and narrow words in the 350m",
    reference=causal_lm("OPTForCausalLM"),
    build=build,
    names={
        "embedding.": "model.decoder.embed_tokens.",
        "embedding.positions.": "model.decoder.embed_positions.",
        "embedding.inner_proj.": "model.decoder.project_in.",
        "layers.{i}.self_attn_input_norm.": f"{LAYER}self_attn_layer_norm.",
        "layers.{i}.self_attn_sum_norm.": f"{LAYER}self_attn_layer_norm.",
        "layers.{i}.self_attn.": f"{LAYER}self_attn.",
        "layers.{i}.self_attn.o_proj.": f"{LAYER}self_attn.out_proj.",
        "layers.{i}.mlp_input_norm.": f"{LAYER}final_layer_norm.",
        "layers.{i}.mlp_sum_norm.": f"{LAYER}final_layer_norm.",
        "layers.{i}.mlp.up_proj.": f"{LAYER}fc1.",
        "layers.{i}.mlp.down_proj.": f"{LAYER}fc2.",
        "head.norm.": "model.decoder.final_layer_norm.",
        "head.inner_proj.": "model.decoder.project_out.",
        "head.projection.": "lm_head.",
    },
    ignore=("model.decoder.version",),
    tiny={
        "vocab_size": 256,
        "hidden_size": 64,
        "ffn_dim": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "word_embed_proj_dim": 64,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "tie_word_embeddings": True,
    },
)
