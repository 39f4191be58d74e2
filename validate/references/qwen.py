"""Qwen of 2023, as transformers' Qwen2ForCausalLM, which has a bias on q, k and v alone, and no other.

c_attn is [3 H D, C]: the rows of q, of k and of v, one after the other. The MLP is c_proj(w1(x) * silu(w2(x))): w2 is
Qwen2's gate. What is done to texts beyond seq_length changes nothing up to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmexport.validate.references import relaid

SOURCE = "transformers Qwen2ForCausalLM, re-laid out"
LAYER = r"transformer\.h\.(\d+)\."
NAMES = {
    r"transformer\.wte\.weight": "model.embed_tokens.weight",
    LAYER + r"ln_1\.weight": r"model.layers.\1.input_layernorm.weight",
    LAYER + r"attn\.c_proj\.weight": r"model.layers.\1.self_attn.o_proj.weight",
    LAYER + r"ln_2\.weight": r"model.layers.\1.post_attention_layernorm.weight",
    LAYER + r"mlp\.w2\.weight": r"model.layers.\1.mlp.gate_proj.weight",
    LAYER + r"mlp\.w1\.weight": r"model.layers.\1.mlp.up_proj.weight",
    LAYER + r"mlp\.c_proj\.weight": r"model.layers.\1.mlp.down_proj.weight",
    r"transformer\.ln_f\.weight": "model.norm.weight",
    r"lm_head\.weight": "lm_head.weight",
}


def make(config: Mapping[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype, attention: str | None) -> Any:
    import transformers

    width = config["num_attention_heads"] * config["kv_channels"]
    state = relaid.taken(tensors, NAMES)
    for i in range(config["num_hidden_layers"]):
        new = [f"model.layers.{i}.self_attn.{n}_proj" for n in "qkv"]
        state |= relaid.split(tensors, f"transformer.h.{i}.attn.c_attn", [width] * 3, new)
    told = {
        **{k: config[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
        "num_key_value_heads": config["num_attention_heads"],
        "head_dim": config["kv_channels"],
        "intermediate_size": config["intermediate_size"] // 2,
        "rms_norm_eps": config["layer_norm_epsilon"],
        "rope_parameters": {"rope_type": "default", "rope_theta": float(config.get("rotary_emb_base", 10000))},
        "max_position_embeddings": config["seq_length"],
        "tie_word_embeddings": False,
    }
    return relaid.loaded(transformers.Qwen2ForCausalLM, told, state, dtype, attention)
