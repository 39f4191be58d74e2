"""InternLM, as transformers' LlamaForCausalLM: the same names and the same mathematics; `bias` is that of q, k, v and
o, as Llama's attention_bias is. Dynamic RoPE changes nothing up to max_position_embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmexport.validate.references import relaid

SOURCE = "transformers LlamaForCausalLM, re-laid out"


def make(config: Mapping[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype, attention: str | None) -> Any:
    import transformers

    theta = config.get("rotary", {}).get("base", 10000)
    told = {
        **{k: config[k] for k in (*relaid.SIZES, "max_position_embeddings")},
        "attention_bias": config.get("bias", True),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(theta)},
    }
    state = relaid.taken(tensors, relaid.SAME)
    return relaid.loaded(transformers.LlamaForCausalLM, told, state, dtype, attention)
