"""InternLM 3, as transformers' LlamaForCausalLM, which is what it loads this type as: the same names and the same
mathematics; `qkv_bias` and `bias` are one in Llama."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmexport.validate.references import relaid

SOURCE = "transformers LlamaForCausalLM"


def make(config: Mapping[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype, attention: str | None) -> Any:
    import transformers

    told = {
        **{k: config[k] for k in (*relaid.SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings")},
        "attention_bias": config.get("qkv_bias", False),
        "mlp_bias": config.get("bias", False),
        "rope_parameters": relaid.rope(config),
    }
    return relaid.loaded(transformers.LlamaForCausalLM, told, relaid.taken(tensors, relaid.SAME), dtype, attention)
