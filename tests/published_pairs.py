"""Configs of encoder-decoders as published on the hub, and the models that they say."""

from __future__ import annotations

import json
from typing import Any

from llmexport.export.encoder_decoder import Sizes, paired
from llmexport.export.spec import Head, Mlp, Model, Norm

PAIRED: dict[str, dict[str, Any]] = json.loads("""{
    "t5-small": {
        "architectures": ["T5ForConditionalGeneration"], "d_ff": 2048, "d_kv": 64, "d_model": 512,
        "decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 1, "initializer_factor": 1.0,
        "is_encoder_decoder": true, "layer_norm_epsilon": 1e-06, "model_type": "t5", "n_positions": 512,
        "num_heads": 8, "num_layers": 6, "output_past": true, "pad_token_id": 0,
        "relative_attention_num_buckets": 32,
        "task_specific_params": {
            "translation_en_to_de": {
                "early_stopping": true, "max_length": 300, "num_beams": 4, "prefix": "translate English to German: "
            }
        },
        "vocab_size": 32128
    },
    "flan-t5-base": {
        "architectures": ["T5ForConditionalGeneration"], "d_ff": 2048, "d_kv": 64, "d_model": 768,
        "decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 1, "feed_forward_proj": "gated-gelu",
        "initializer_factor": 1.0, "is_encoder_decoder": true, "layer_norm_epsilon": 1e-06, "model_type": "t5",
        "n_positions": 512, "num_decoder_layers": 12, "num_heads": 12, "num_layers": 12, "output_past": true,
        "pad_token_id": 0, "relative_attention_max_distance": 128, "relative_attention_num_buckets": 32,
        "tie_word_embeddings": false, "transformers_version": "4.23.1", "use_cache": true, "vocab_size": 32128
    }
}""")


def _t5(hidden: int, heads: int, layers: int, *, gated: bool) -> Model:
    norm, mlp = Norm(hidden, 1e-6), Mlp(hidden, 2048, "gelu_tanh" if gated else "relu", gated=gated)
    sizes = Sizes(32128, norm, mlp, heads, 64, 32, 128, layers, layers)
    head = Head(norm, 32128, scale=1.0 if gated else hidden**-0.5)
    return paired(sizes, head, mlp="gated_mlp" if gated else "mlp")


PAIRED_MODELS = {"t5-small": _t5(512, 8, 6, gated=False), "flan-t5-base": _t5(768, 12, 12, gated=True)}
