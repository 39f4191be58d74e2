"""OLMo 2 (transformers modeling_olmo2.py): norms on what attention and MLP give; q and k normed over all heads."""

from llmexport.export.config import Config
from llmexport.export.decoder import BUFFERS, NAMES, TINY, decoder
from llmexport.export.spec import Arch, Mask, Model, causal_lm, decoder_layer


def build(config: Config) -> Model:
    bias = config.flag("attention_bias")
    d = decoder(config, grouped=False)
    norm = d.norm(1e-5, rounding="after_weight")
    attention = d.attention(qkv_bias=bias, out_bias=bias, qk_norm=norm, qk_norm_over="all_heads")
    layer = decoder_layer(None, attention, None, d.mlp(), mixer_output_norm=norm, mlp_output_norm=norm)
    return d.model([(layer, (config.rotary(d.head_size), Mask()))] * d.layers, norm, tied=False)


ARCH = Arch(
    model_types=("olmo2",),
    adds="norms on what attention and MLP give, q and k normed over all heads",
    reference=causal_lm("Olmo2ForCausalLM"),
    build=build,
    names={
        **NAMES,
        "layers.{i}.self_attn_output_norm.": "model.layers.{i}.post_attention_layernorm.",
        "layers.{i}.mlp_output_norm.": "model.layers.{i}.post_feedforward_layernorm.",
    },
    ignore=BUFFERS,
    tiny={**TINY, "attention_bias": False, "pad_token_id": 0, "eos_token_id": 1},
)
