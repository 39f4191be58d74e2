"""GLM-4-9B of 2024, converted ChatGLM3 (transformers modeling_glm.py): pre-norm, interleaved half RoPE, fused MLP."""

from llmexport.export.config import Config
from llmexport.export.decoder import BUFFERS, NAMES, TINY, decoder
from llmexport.export.spec import Arch, Mask, Model, causal_lm, decoder_layer


def build(config: Config) -> Model:
    d = decoder(config, head_size=128)
    rotary = config.rotary(d.head_size, partial=0.5)
    norm = d.norm(1.5625e-7)
    attention = d.attention(qkv_bias=config.flag("attention_bias", True), rotated=rotary.size, interleaved=True)
    layer = decoder_layer(norm, attention, norm, d.mlp(fused=True))
    return d.model([(layer, (rotary, Mask()))] * d.layers, norm, tied=False)


ARCH = Arch(
    model_types=("glm",),
    system="ChatGLM3, GLM-4-9B",
    adds="interleaved RoPE over half a head, fused gate and up",
    reference=causal_lm("GlmForCausalLM"),
    build=build,
    names=NAMES,
    ignore=BUFFERS,
    tiny={
        **TINY,
        "head_dim": 16,
        "attention_bias": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
)
