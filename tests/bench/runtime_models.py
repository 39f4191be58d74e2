"""The small models of bench_runtime.py: published configs with fewer and narrower layers, 0.1 to 0.5 billion."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from published_configs import PUBLISHED

SMALL: dict[str, Any] = {"hidden_size": 768, "vocab_size": 32_000, "head_dim": 64, "num_attention_heads": 12}
SMALL |= {"num_key_value_heads": 4, "torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
KINDS = ["sliding_attention", "full_attention"]
LINEAR = [*["linear_attention"] * 3, "full_attention"]


def _changed(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """What is published with these changes; None takes a key away."""
    return {k: v for k, v in {**PUBLISHED[name], **changes}.items() if v is not None}


QWEN3_5 = SMALL | {"num_hidden_layers": 8, "layer_types": LINEAR * 2, "head_dim": 128, "num_attention_heads": 6}
QWEN3_5 |= {"num_key_value_heads": 2, "moe_intermediate_size": 192, "shared_expert_intermediate_size": 192}
QWEN3_5 |= {"linear_num_key_heads": 4, "linear_num_value_heads": 8, "num_experts": 64, "dtype": "float32"}
QWEN3_5 |= {"rope_parameters": {**PUBLISHED["Qwen3.5-35B-A3B"]["text_config"]["rope_parameters"]}}
QWEN3_5["rope_parameters"]["mrope_section"] = [6, 5, 5]
EYES = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 768}
MODELS: dict[str, dict[str, Any]] = {
    "llama-125m": _changed(
        "Llama-2-7b", SMALL | {"num_hidden_layers": 12, "intermediate_size": 2048, "max_position_embeddings": 8192}
    ),
    "qwen2-0.5b": _changed("Qwen2.5-0.5B-Instruct", {"torch_dtype": "float32"}),
    "gemma-130m": _changed(
        "gemma-2b",
        SMALL
        | {"num_hidden_layers": 12, "intermediate_size": 3072, "head_dim": 256, "num_attention_heads": 4}
        | {"num_key_value_heads": 1},
    ),
    "mixtral-0.3b": _changed(
        "Mixtral-8x7B-v0.1", SMALL | {"num_hidden_layers": 8, "intermediate_size": 1536, "head_dim": None}
    ),
    "gpt-oss-0.3b": _changed(
        "gpt-oss-20b",
        SMALL
        | {"num_hidden_layers": 8, "intermediate_size": 384, "layer_types": KINDS * 4, "quantization_config": None},
    ),
    "qwen3.5-moe-0.3b": _changed(
        "Qwen3.5-35B-A3B",
        {
            "text_config": {**PUBLISHED["Qwen3.5-35B-A3B"]["text_config"], **QWEN3_5},
            "vision_config": {**PUBLISHED["Qwen3.5-35B-A3B"]["vision_config"], **EYES},
            "image_token_id": 31_000,
            "video_token_id": 31_001,
            "vision_start_token_id": 31_002,
            "vision_end_token_id": 31_003,
        },
    ),
}
