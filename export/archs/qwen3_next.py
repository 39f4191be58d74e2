"""Qwen3-Next (transformers modeling_qwen3_next.py): Qwen3.5's hybrid before it, its delta nets fused key head by key
head, RoPE in one dimension."""

from llmexport.export.archs.qwen3_5 import AHEAD, TINY_HYBRID
from llmexport.export.archs.qwen3_5_moe import ARCH as QWEN3_5_MOE
from llmexport.export.config import Config
from llmexport.export.decoder import BUFFERS, decoder
from llmexport.export.spec import (
    Arch,
    Experts,
    GatedDeltaNet,
    Mask,
    Mlp,
    Model,
    Moe,
    Norm,
    Presence,
    Router,
    SharedExpert,
    causal_lm,
    decoder_layer,
)


def build(config: Config) -> Model:
    d = decoder(config, head_size=256)
    norm, activation = d.norm(offset=1.0, rounding="after_weight"), d.activation()
    config.expect("hidden_act", "silu")
    config.expect("use_sliding_window", False)
    experts, top_k = config.count("num_experts", 512), config.count("num_experts_per_tok", 10)
    shared = config.length("shared_expert_intermediate_size", 512)
    moe = Moe(
        Router(d.hidden, experts, top_k, "softmax", renormalise=config.flag("norm_topk_prob", True)),
        Experts(d.hidden, config.length("moe_intermediate_size", 512), experts, top_k, activation),
        SharedExpert(Mlp(d.hidden, shared, activation), gated=True),
    )
    linear = GatedDeltaNet(
        d.hidden,
        key_heads=config.count("linear_num_key_heads", 16),
        key_size=config.length("linear_key_head_dim", 128),
        value_heads=config.count("linear_num_value_heads", 32),
        value_size=config.length("linear_value_head_dim", 128),
        kernel=config.count("linear_conv_kernel_dim", 4, least=2),
        epsilon=norm.epsilon,
        grouped=True,
    )
    bias, rotary = config.flag("attention_bias"), config.rotary(d.head_size, partial=0.25)
    heads = Norm(d.head_size, norm.epsilon, 1.0, "after_weight")
    full = d.attention(qkv_bias=bias, out_bias=bias, rotated=rotary.size, qk_norm=heads, output_gate=True)
    mixers = {"linear_attention": (linear, (Presence(),)), "full_attention": (full, (rotary, Mask()))}
    interval = config.integer("full_attention_interval", 4)
    derived = ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(d.layers)]
    dense, step = config.layer_set("mlp_only_layers", ()), config.integer("decoder_sparse_step", 1)
    plain, layers = d.mlp(activation=activation), []
    for i, (mixer, reads) in enumerate(config.layer_types(mixers, derived)):
        mlp = plain if i in dense or (i + 1) % step else moe
        layers.append((decoder_layer(norm, mixer, norm, mlp), reads))
    return d.model(layers, norm, tied=False)


ARCH = Arch(
    model_types=("qwen3_next",),
    adds="gated delta nets, fused key head by key head; gated attention; experts beside a shared one",
    reference=causal_lm("Qwen3NextForCausalLM"),
    build=build,
    names=QWEN3_5_MOE.names,
    stacks=QWEN3_5_MOE.stacks,
    in_parts=True,
    ignore=(*AHEAD, *BUFFERS),
    tiny={
        **TINY_HYBRID,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000000.0, "partial_rotary_factor": 0.25},
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "mlp_only_layers": [1],
        "attention_bias": False,
    },
)
