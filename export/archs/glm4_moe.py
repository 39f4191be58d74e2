"""GLM-4.5, 4.6 and 4.7 (transformers modeling_glm4_moe.py): DeepSeek V3's experts behind attention with half a RoPE."""

from llmexport.export.archs.deepseek_v3 import HARMLESS, MOE_NAMES, MOE_STACKS, experts
from llmexport.export.config import Config
from llmexport.export.decoder import AHEAD, BUFFERS, TINY, decoder
from llmexport.export.spec import Arch, Mask, Model, Norm, causal_lm, decoder_layer


def build(config: Config) -> Model:
    config.leave(HARMLESS)
    d = decoder(config)
    norm, rotary = d.norm(1e-5), config.rotary(d.head_size, partial=0.5)
    heads = Norm(d.head_size, norm.epsilon) if config.flag("use_qk_norm") else None
    attention = d.attention(qkv_bias=config.flag("attention_bias"), rotated=rotary.size, qk_norm=heads)
    groups = (config.count("n_group", 1), config.count("topk_group", 1))
    dense, moe = d.mlp(), experts(d, groups, scale=1.0, count=128, top_k=8, width=1408)
    first = config.integer("first_k_dense_replace", 1, least=0)
    layers = [decoder_layer(norm, attention, norm, dense if i < first else moe) for i in range(d.layers)]
    return d.model([(layer, (rotary, Mask())) for layer in layers], norm, tied=False)


ARCH = Arch(
    model_types=("glm4_moe",),
    adds="experts chosen with a correction, RoPE over half a head, q and k norms",
    reference=causal_lm("Glm4MoeForCausalLM"),
    build=build,
    names=MOE_NAMES,
    stacks=MOE_STACKS,
    in_parts=True,
    ignore=BUFFERS,
    ahead=AHEAD,
    tiny={
        **TINY,
        "head_dim": 32,
        "rms_norm_eps": 1e-5,
        "attention_bias": True,
        "use_qk_norm": True,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "first_k_dense_replace": 1,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "partial_rotary_factor": 0.5},
    },
)
