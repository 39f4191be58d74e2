"""Hunyuan, dense (transformers modeling_hunyuan_v1_dense.py): norms on heads of q and k after RoPE, whose base an alpha
stretches."""

from llmexport.export.config import Config
from llmexport.export.decoder import BUFFERS, NAMES, TINY, decoder
from llmexport.export.spec import Arch, Mask, Model, Norm, causal_lm, decoder_layer

ATTENTION = "model.layers.{i}.self_attn."
ROPE = {"default": "default", "dynamic": "alpha"}
# Of tokens, of classes, and of caches that layers share, which there are none of.
UNUSED: tuple[str, ...] = (
    "cla_share_factor",
    "class_num",
    "dense_list",
    "org_vocab_size",
    "pool_type",
    "pad_id",
    "eod_token_id",
)
UNUSED += ("im_start_id", "im_end_id", "im_newline_id", "text_start_id", "text_end_id", "mask_init_id")


def build(config: Config) -> Model:
    bias = config.flag("attention_bias")
    d = decoder(config, grouped=False)
    norm = d.norm(1e-5)
    heads = Norm(d.head_size, norm.epsilon)
    attention = d.attention(qkv_bias=bias, out_bias=bias, qk_norm=heads, qk_norm_place="after_rotary")
    reads = (config.rotary(d.head_size, types=ROPE), Mask())
    unused(config, d.head_size)
    return d.model([(decoder_layer(norm, attention, norm, d.mlp()), reads)] * d.layers, norm, tied=False)


def unused(config: Config, head_size: int) -> None:
    """What the first code had switches for, as all published models set them."""
    for key in ("use_qk_norm", "use_rotary_pos_emb"):
        config.expect(key, True)
    for key in ("add_classification_head", "mlp_bias", "position_embedding_xdrope", "use_cla"):
        config.expect(key, False)
    config.expect("attention_head_dim", head_size)
    config.expect("norm_type", "rms", "hf_rms")
    config.leave(UNUSED)


ARCH = Arch(
    model_types=("hunyuan_v1_dense",),
    adds="q and k norms after RoPE, whose base an alpha stretches",
    reference=causal_lm("HunYuanDenseV1ForCausalLM"),
    build=build,
    names={
        **NAMES,
        "layers.{i}.self_attn.q_norm.": ATTENTION + "query_layernorm.",
        "layers.{i}.self_attn.k_norm.": ATTENTION + "key_layernorm.",
    },
    ignore=BUFFERS,
    tiny={
        **TINY,
        "head_dim": 32,
        "attention_bias": False,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0, "alpha": 50.0},
    },
)
