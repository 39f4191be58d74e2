"""GLM-4-0414 (transformers modeling_glm4.py): four norms a layer, interleaved RoPE over half of a head, fused MLP."""

from llmexport.export.config import Config
from llmexport.export.decoder import BUFFERS, NAMES, TINY, decoder
from llmexport.export.spec import Arch, Mask, Model, causal_lm, decoder_layer


def build(config: Config) -> Model:
    d = decoder(config, head_size=128)
    rotary = config.rotary(d.head_size, partial=0.5)
    norm = d.norm(1.5625e-7)
    attention = d.attention(qkv_bias=config.flag("attention_bias", True), rotated=rotary.size, interleaved=True)
    layer = decoder_layer(norm, attention, norm, d.mlp(fused=True), mixer_output_norm=norm, mlp_output_norm=norm)
    return d.model([(layer, (rotary, Mask()))] * d.layers, norm, tied=False)


ARCH = Arch(
    model_types=("glm4",),
    system="GLM-4-0414",
    adds="four norms a layer, interleaved RoPE over half a head, fused gate and up",
    reference=causal_lm("Glm4ForCausalLM"),
    build=build,
    names={
        **NAMES,
        "layers.{i}.self_attn_output_norm.": "model.layers.{i}.post_self_attn_layernorm.",
        "layers.{i}.mlp_output_norm.": "model.layers.{i}.post_mlp_layernorm.",
    },
    ignore=BUFFERS,
    # vLLM refuses float16 for it (_FLOAT16_NOT_SUPPORTED_MODELS of vllm/config/model.py).
    overflows_float16="published GLM-4 checkpoints are numerically unstable in float16",
    tiny={
        **TINY,
        "head_dim": 16,
        "attention_bias": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
)
