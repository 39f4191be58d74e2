"""ChatGLM2, ChatGLM3 and GLM-4, as transformers' GlmForCausalLM.

query_key_value is [(H + 2 G) D, C]: the rows of the H queries, of the G keys and of the G values. dense_h_to_4h has the
rows of the gate and then those that go up, as Glm's gate_up_proj. Half of a head turns, pairs of neighbours, with theta
10000 times rope_ratio. The scores are divided by the number of the layer and multiplied again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmexport.validate.references import relaid

SOURCE = "transformers GlmForCausalLM, re-laid out"
LAYER = r"transformer\.encoder\.layers\.(\d+)\."
NAMES = {
    r"transformer\.embedding\.word_embeddings\.weight": "model.embed_tokens.weight",
    LAYER + r"((?:input|post_attention)_layernorm\.weight)": r"model.layers.\1.\2",
    LAYER + r"self_attention\.dense\.weight": r"model.layers.\1.self_attn.o_proj.weight",
    LAYER + r"mlp\.dense_h_to_4h\.weight": r"model.layers.\1.mlp.gate_up_proj.weight",
    LAYER + r"mlp\.dense_4h_to_h\.weight": r"model.layers.\1.mlp.down_proj.weight",
    r"transformer\.encoder\.final_layernorm\.weight": "model.norm.weight",
    r"transformer\.output_layer\.weight": "lm_head.weight",
}


def make(config: Mapping[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype, attention: str | None) -> Any:
    import transformers

    heads, groups, size = (config[k] for k in ("num_attention_heads", "multi_query_group_num", "kv_channels"))
    state = relaid.taken(tensors, NAMES)
    for i in range(config["num_layers"]):
        new = [f"model.layers.{i}.self_attn.{n}_proj" for n in "qkv"]
        name = f"transformer.encoder.layers.{i}.self_attention.query_key_value"
        state |= relaid.split(tensors, name, [heads * size, groups * size, groups * size], new)
    theta = 10000.0 * config.get("rope_ratio", 1)
    told = {
        "vocab_size": config["padded_vocab_size"],
        "hidden_size": config["hidden_size"],
        "num_hidden_layers": config["num_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": size,
        "intermediate_size": config["ffn_hidden_size"],
        "rms_norm_eps": config["layernorm_epsilon"],
        "attention_bias": config.get("add_qkv_bias", False),
        "rope_parameters": {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": 0.5},
        "tie_word_embeddings": False,
    }
    return relaid.loaded(transformers.GlmForCausalLM, told, state, dtype, attention)
