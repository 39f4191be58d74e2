"""GPT-NeoX and Pythia (transformers modeling_gpt_neox.py): two norms side by side, partial RoPE, fused q, k, v."""

from llmexport.export.config import Config
from llmexport.export.decoder import PLAIN, TINY, decoder
from llmexport.export.spec import Arch, Mask, Model, Norm, causal_lm, decoder_layer

LAYER = "gpt_neox.layers.{i}."
KEYS = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}


def build(config: Config) -> Model:
    d = decoder(config, grouped=False)
    config.expect("num_key_value_heads", None, d.heads)
    bias, parallel = config.flag("attention_bias", True), config.flag("use_parallel_residual", True)
    theta, share = KEYS.values()
    rotary = config.rotary(d.head_size, partial=0.25, theta_key=theta, partial_key=share)
    norm = Norm(d.hidden, config.number("layer_norm_eps", 1e-5), statistics="layer", bias=True)
    mlp = d.mlp(activation=config.choice("hidden_act", PLAIN, "gelu"), bias=True, gated=False)
    attention = d.attention(qkv_bias=bias, out_bias=bias, fused=True, grouped=True, rotated=rotary.size)
    layer = decoder_layer(norm, attention, norm, mlp, parallel=parallel)
    return d.model([(layer, (rotary, Mask()))] * d.layers, norm, tied=False)


ARCH = Arch(
    model_types=("gpt_neox",),
    adds="attention and MLP side by side with a norm each, partial RoPE, LayerNorm, q, k, v fused head by head",
    reference=causal_lm("GPTNeoXForCausalLM"),
    build=build,
    names={
        "embedding.": "gpt_neox.embed_in.",
        "layers.{i}.self_attn_input_norm.": f"{LAYER}input_layernorm.",
        "layers.{i}.self_attn.qkv_proj.": f"{LAYER}attention.query_key_value.",
        "layers.{i}.self_attn.o_proj.": f"{LAYER}attention.dense.",
        "layers.{i}.mlp_input_norm.": f"{LAYER}post_attention_layernorm.",
        "layers.{i}.mlp.up_proj.": f"{LAYER}mlp.dense_h_to_4h.",
        "layers.{i}.mlp.down_proj.": f"{LAYER}mlp.dense_4h_to_h.",
        "head.norm.": "gpt_neox.final_layer_norm.",
        "head.projection.": "embed_out.",
    },
    base="gpt_neox.",
    rope_keys=KEYS,
    ignore=tuple(f"gpt_neox.layers.*.attention.{b}" for b in ("bias", "masked_bias", "rotary_emb.inv_freq")),
    tiny={
        **{k: v for k, v in TINY.items() if k not in ("rms_norm_eps", "num_key_value_heads")},
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "attention_bias": True,
        "use_parallel_residual": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    },
)
