"""InternLM 2, as transformers' LlamaForCausalLM.

wqkv is [G (H / G + 2) D, C]: for each of the G heads of keys, the queries that share it, the key, the value. w1 is the
gate, w3 goes up, w2 down. Its dynamic RoPE (InternLM2DynamicNTKScalingRotaryEmbedding) is that of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmexport.validate.references import relaid

SOURCE = "transformers LlamaForCausalLM, re-laid out"
LAYER = r"model\.layers\.(\d+)\."
NAMES = {
    r"model\.tok_embeddings\.(.*)": r"model.embed_tokens.\1",
    LAYER + r"attention_norm\.(.*)": r"model.layers.\1.input_layernorm.\2",
    LAYER + r"attention\.wo\.(.*)": r"model.layers.\1.self_attn.o_proj.\2",
    LAYER + r"ffn_norm\.(.*)": r"model.layers.\1.post_attention_layernorm.\2",
    LAYER + r"feed_forward\.w1\.(.*)": r"model.layers.\1.mlp.gate_proj.\2",
    LAYER + r"feed_forward\.w3\.(.*)": r"model.layers.\1.mlp.up_proj.\2",
    LAYER + r"feed_forward\.w2\.(.*)": r"model.layers.\1.mlp.down_proj.\2",
    r"model\.norm\.(.*)": r"model.norm.\1",
    r"output\.(.*)": r"lm_head.\1",
}


def make(config: Mapping[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype, attention: str | None) -> Any:
    import transformers

    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size, together = config["hidden_size"] // heads, heads // groups
    state = relaid.taken(tensors, NAMES)
    for i in range(config["num_hidden_layers"]):
        for end in ("weight", "bias") if config.get("bias", True) else ("weight",):
            fused = tensors.pop(f"model.layers.{i}.attention.wqkv.{end}")
            rows = fused.reshape(groups, together + 2, size, *fused.shape[1:])
            cut = {"q": rows[:, :together], "k": rows[:, together], "v": rows[:, together + 1]}
            for name, part in cut.items():
                made = part.reshape(-1, *fused.shape[1:])
                state[f"model.layers.{i}.self_attn.{name}_proj.{end}"] = made
    told = {
        **{k: config[k] for k in (*relaid.SIZES, "num_key_value_heads", "max_position_embeddings")},
        "attention_bias": config.get("bias", True),
        "rope_parameters": relaid.rope(config),
    }
    return relaid.loaded(transformers.LlamaForCausalLM, told, state, dtype, attention)
