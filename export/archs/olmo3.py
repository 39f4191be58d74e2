"""OLMo 3 (transformers modeling_olmo3.py): OLMo 2, three sliding layers to a full one, whose RoPE alone is scaled."""

from llmexport.export.config import Config
from llmexport.export.decoder import BUFFERS, NAMES, TINY, decoder
from llmexport.export.spec import Arch, Mask, Model, causal_lm, decoder_layer

THETA = 500000.0


def build(config: Config) -> Model:
    bias = config.flag("attention_bias")
    d = decoder(config, grouped=False)
    norm = d.norm(1e-5, rounding="after_weight")
    attention = d.attention(qkv_bias=bias, out_bias=bias, qk_norm=norm, qk_norm_over="all_heads")
    block = decoder_layer(None, attention, None, d.mlp(), mixer_output_norm=norm, mlp_output_norm=norm)
    # transformers takes another one for full layers alone, vLLM for all.
    config.expect("rope_theta", THETA)
    local, far = (config.rotary(d.head_size, THETA, layer_kind=f"{k}_attention") for k in ("sliding", "full"))
    kinds = {
        "sliding_attention": (block, (local, Mask(config.integer("sliding_window", 4096)))),
        "full_attention": (block, (far, Mask())),
    }
    derived = ["sliding_attention" if (i + 1) % 4 else "full_attention" for i in range(d.layers)]
    return d.model(config.layer_types(kinds, derived), norm, tied=False)


ARCH = Arch(
    model_types=("olmo3",),
    adds="OLMo 2's norms, sliding windows, YaRN in full layers alone",
    reference=causal_lm("Olmo3ForCausalLM"),
    build=build,
    names={
        **NAMES,
        "layers.{i}.self_attn_output_norm.": "model.layers.{i}.post_attention_layernorm.",
        "layers.{i}.mlp_output_norm.": "model.layers.{i}.post_feedforward_layernorm.",
    },
    ignore=BUFFERS,
    tiny={
        **TINY,
        "attention_bias": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "attention_factor": 1.2,
            },
        },
    },
)
