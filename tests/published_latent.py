"""Published configs of models that attend over latents, without what says how weights are quantised, and what each
must read as."""

from __future__ import annotations

import json
from typing import Any

from llmexport.export.rope import mscale
from llmexport.export.spec import (
    Embedding,
    Experts,
    Head,
    KimiDeltaAttention,
    LatentAttention,
    Layer,
    Mask,
    Mlp,
    Model,
    Moe,
    Norm,
    Presence,
    Rotary,
    Router,
    SharedExpert,
    YarnScaling,
    decoder_layer,
)
from llmexport.export.stack import wired

LATENT: dict[str, dict[str, Any]] = json.loads("""{
    "DeepSeek-V3": {
        "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_deepseek.DeepseekV3Config", "AutoModel": "modeling_deepseek.DeepseekV3Model",
            "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"
        },
        "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu",
        "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512,
        "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 2048,
        "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": true,
        "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096, "type": "yarn"
        },
        "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": false,
        "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.33.1",
        "use_cache": true, "v_head_dim": 128, "vocab_size": 129280
    },
    "DeepSeek-V2-Lite": {
        "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_deepseek.DeepseekV2Config", "AutoModel": "modeling_deepseek.DeepseekV2Model",
            "AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM"
        },
        "aux_loss_alpha": 0.001, "bos_token_id": 100000, "eos_token_id": 100001, "first_k_dense_replace": 1,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 10944,
        "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v2",
        "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64,
        "n_shared_experts": 2, "norm_topk_prob": false, "num_attention_heads": 16, "num_experts_per_tok": 6,
        "num_hidden_layers": 27, "num_key_value_heads": 16, "pretraining_tp": 1, "q_lora_rank": null,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096, "type": "yarn"
        },
        "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": true,
        "tie_word_embeddings": false, "topk_group": 1, "topk_method": "greedy", "torch_dtype": "bfloat16",
        "transformers_version": "4.33.1", "use_cache": true, "v_head_dim": 128, "vocab_size": 102400
    },
    "GLM-4.7-Flash": {
        "architectures": ["Glm4MoeLiteForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "dtype": "bfloat16", "eos_token_id": [154820, 154827, 154829], "first_k_dense_replace": 1,
        "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 10240, "kv_lora_rank": 512,
        "max_position_embeddings": 202752, "model_type": "glm4_moe_lite", "moe_intermediate_size": 1536,
        "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 1, "norm_topk_prob": true,
        "num_attention_heads": 20, "num_experts_per_tok": 4, "num_hidden_layers": 47, "num_key_value_heads": 20,
        "num_nextn_predict_layers": 1, "pad_token_id": 154820, "partial_rotary_factor": 1.0, "q_lora_rank": 768,
        "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-05, "rope_scaling": null,
        "rope_theta": 1000000, "routed_scaling_factor": 1.8, "tie_word_embeddings": false, "topk_group": 1,
        "topk_method": "noaux_tc", "transformers_version": "5.0.0rc0", "v_head_dim": 256, "vocab_size": 154880
    },
    "Kimi-Linear-48B-A3B-Instruct": {
        "architectures": ["KimiLinearForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_kimi.KimiLinearConfig", "AutoModel": "modeling_kimi.KimiLinearModel",
            "AutoModelForCausalLM": "modeling_kimi.KimiLinearForCausalLM"
        },
        "bos_token_id": 163584, "dtype": "bfloat16", "eos_token_id": 163586, "first_k_dense_replace": 1,
        "head_dim": 72, "hidden_act": "silu", "hidden_size": 2304, "initializer_range": 0.02,
        "intermediate_size": 9216, "kv_lora_rank": 512,
        "linear_attn_config": {
            "full_attn_layers": [4, 8, 12, 16, 20, 24, 27], "head_dim": 128,
            "kda_layers": [1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15, 17, 18, 19, 21, 22, 23, 25, 26],
            "num_heads": 32, "short_conv_kernel_size": 4
        },
        "mla_use_nope": true, "model_max_length": 1048576, "model_type": "kimi_linear",
        "moe_intermediate_size": 1024, "moe_layer_freq": 1, "moe_renormalize": true,
        "moe_router_activation_func": "sigmoid", "num_attention_heads": 32, "num_expert_group": 1,
        "num_experts": 256, "num_experts_per_token": 8, "num_hidden_layers": 27, "num_key_value_heads": 32,
        "num_nextn_predict_layers": 0, "num_shared_experts": 1, "pad_token_id": 163839, "q_lora_rank": null,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-05, "rope_scaling": null,
        "rope_theta": 10000.0, "routed_scaling_factor": 2.446, "tie_word_embeddings": false, "topk_group": 1,
        "transformers_version": "4.56.2", "use_cache": true, "use_grouped_topk": true, "v_head_dim": 128,
        "vocab_size": 163840
    }
}""")
# Of another type, with keys of training and with RoPE's ends at one place.
LATENT["Kimi-K2-Instruct-0905"] = LATENT["DeepSeek-V3"] | {
    "model_type": "kimi_k2",
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "num_nextn_predict_layers": 0,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "max_position_embeddings": 262144,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "topk_group": 1,
    "vocab_size": 163840,
    "rope_scaling": LATENT["DeepSeek-V3"]["rope_scaling"] | {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 64.0},
}
# What only the larger of the two V2 has.
LATENT["DeepSeek-V2"] = LATENT["DeepSeek-V2-Lite"] | {
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_group": 8,
    "n_routed_experts": 160,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 16.0,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
}


def model(
    mixer: LatentAttention,
    rotary: Rotary,
    moe: Moe,
    dense: int,
    layers: int,
    words: int,
    epsilon: float,
    first: int = 1,
) -> Model:
    """`first` layers have an MLP of size `dense`, the others experts."""
    norm = Norm(mixer.hidden, epsilon)

    def layer(mlp: Mlp | Moe) -> Layer:
        return decoder_layer(norm, mixer, norm, mlp)

    blocks = [layer(Mlp(mixer.hidden, dense, "silu"))] * first + [layer(moe)] * (layers - first)
    reads = (rotary, Mask())
    return wired(Embedding(words, mixer.hidden), [(b, reads) for b in blocks], Head(norm, words), tied=False)


def chosen_by_sigmoid(hidden: int, width: int, count: int, top_k: int, scale: float, groups: int, kept: int) -> Moe:
    router = Router(
        *(hidden, count, top_k, "sigmoid"),
        renormalise=True,
        correction=True,
        groups=groups,
        groups_kept=kept,
        scale=scale,
        wide=True,
    )
    return Moe(router, Experts(hidden, width, count, top_k), SharedExpert(Mlp(hidden, width, "silu")))


def chosen_by_softmax(hidden: int, width: int, count: int, scale: float, groups: int, kept: int) -> Moe:
    chosen = {"groups": groups, "groups_kept": kept, "group_best": 1, "scale": scale, "wide": True}
    shared = SharedExpert(Mlp(hidden, 2 * width, "silu"))
    return Moe(Router(hidden, count, 6, "softmax", **chosen), Experts(hidden, width, count, 6), shared)


def yarn(theta: float, factor: float, fast: float = 32.0) -> Rotary:
    return Rotary(64, theta, YarnScaling(factor, 4096, fast, 1.0, truncate=True, magnitude=1.0))


def scale(factor: float, weight: float) -> float:
    return 192**-0.5 * mscale(factor, weight) ** 2


def of_deepseek(heads: int, factor: float) -> LatentAttention:
    return LatentAttention(7168, heads, 128, 64, 128, 512, 1536, scale(factor, 1.0), parted=True)


def kimi_linear() -> Model:
    norm, moe = Norm(2304, 1e-5), chosen_by_sigmoid(2304, 1024, 256, 8, 2.446, 1, 1)
    delta = (KimiDeltaAttention(2304, 32, 128, 4, 1e-5), (Presence(),))
    full = (LatentAttention(2304, 32, 128, 64, 128, 512, None, 192**-0.5, turned=False), (Mask(),))
    layers = []
    for i in range(27):
        mixer, reads = full if i in (3, 7, 11, 15, 19, 23, 26) else delta
        layers.append((decoder_layer(norm, mixer, norm, moe if i else Mlp(2304, 9216, "silu")), reads))
    return wired(Embedding(163840, 2304), layers, Head(norm, 163840), tied=False)


LATENT_MODELS = {
    "Kimi-Linear-48B-A3B-Instruct": kimi_linear(),
    "DeepSeek-V3": model(
        *(of_deepseek(128, 40.0), yarn(10000.0, 40.0), chosen_by_sigmoid(7168, 2048, 256, 8, 2.5, 8, 4)),
        *(18432, 61, 129280, 1e-6, 3),
    ),
    "Kimi-K2-Instruct-0905": model(
        *(of_deepseek(64, 64.0), yarn(50000.0, 64.0, 1.0), chosen_by_sigmoid(7168, 2048, 384, 8, 2.827, 1, 1)),
        *(18432, 61, 163840, 1e-6),
    ),
    "DeepSeek-V2-Lite": model(
        LatentAttention(2048, 16, 128, 64, 128, 512, None, scale(40.0, 0.707), interleaved=True),
        *(yarn(10000.0, 40.0), chosen_by_softmax(2048, 1408, 64, 1.0, 1, 1), 10944, 27, 102400, 1e-6),
    ),
    "DeepSeek-V2": model(
        LatentAttention(5120, 128, 128, 64, 128, 512, 1536, scale(40.0, 0.707), interleaved=True),
        *(yarn(10000.0, 40.0), chosen_by_softmax(5120, 1536, 160, 16.0, 8, 3), 12288, 60, 102400, 1e-6),
    ),
    "GLM-4.7-Flash": model(
        LatentAttention(2048, 20, 192, 64, 256, 512, 768, 256**-0.5, parted=True),
        *(Rotary(64, 1000000.0), chosen_by_sigmoid(2048, 1536, 64, 4, 1.8, 1, 1), 10240, 47, 154880, 1e-5),
    ),
}
