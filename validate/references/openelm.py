"""OpenELM, as transformers' Qwen3 whose layers have sizes of their own.

A layer of Qwen 3 is one of OpenELM: RMSNorm before attention and before a SiLU-gated MLP, q and k normed head by head
before RoPE, no biases. qkv_proj is [(heads + 2 kv_heads) d, C]: the rows of q, of k and of v; proj_1 is [2 I, C]: the
rows that SiLU reads, then those that it gates. OpenELM caches keys that RoPE has not turned and turns all of them at
each step: by the same angles, as a token's position does not change.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmexport.validate.references import relaid

SOURCE = "transformers Qwen3DecoderLayer, of each layer's own sizes"
NAMES = {
    r"transformer\.token_embeddings\.(.*)": r"model.embed_tokens.\1",
    r"transformer\.layers\.(\d+)\.attn\.([qk]_norm\..*)": r"model.layers.\1.self_attn.\2",
    r"transformer\.layers\.(\d+)\.attn\.out_proj\.(.*)": r"model.layers.\1.self_attn.o_proj.\2",
    r"transformer\.layers\.(\d+)\.ffn\.proj_2\.(.*)": r"model.layers.\1.mlp.down_proj.\2",
    r"transformer\.layers\.(\d+)\.attn_norm\.(.*)": r"model.layers.\1.input_layernorm.\2",
    r"transformer\.layers\.(\d+)\.ffn_norm\.(.*)": r"model.layers.\1.post_attention_layernorm.\2",
    r"transformer\.norm\.(.*)": r"model.norm.\1",
    r"lm_head\.(.*)": r"lm_head.\1",
}


def make(config: Mapping[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype, attention: str | None) -> Any:
    size, layers, state, sizes = config["head_dim"], config["num_transformer_layers"], dict[str, Tensor](), []
    for i in range(layers):
        there, here = f"transformer.layers.{i}.", f"model.layers.{i}."
        heads, keys = config["num_query_heads"][i], config["num_kv_heads"][i]
        width = tensors[there + "ffn.proj_1.weight"].shape[0] // 2
        qkv = [here + f"self_attn.{n}_proj" for n in "qkv"]
        state |= relaid.split(tensors, there + "attn.qkv_proj", [n * size for n in (heads, keys, keys)], qkv)
        state |= relaid.split(
            tensors, there + "ffn.proj_1", [width] * 2, [here + f"mlp.{n}_proj" for n in ("gate", "up")]
        )
        sizes.append({"num_attention_heads": heads, "num_key_value_heads": keys, "intermediate_size": width})
    state |= relaid.taken(tensors, NAMES)
    like = {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["model_dim"],
        "head_dim": size,
        "num_hidden_layers": layers,
        "hidden_act": {"swish": "silu"}.get(config["activation_fn_name"], config["activation_fn_name"]),
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(config["rope_freq_constant"])},
        "tie_word_embeddings": config["share_input_output_layers"],
        "normalised": config["normalize_qk_projections"],
        "sizes": sizes,
    }
    return relaid.loaded(_layered(), like, state, dtype, attention)


def _layered() -> Any:
    import transformers
    from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

    class Layered(transformers.Qwen3ForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            for i, own in enumerate(config.sizes):
                sized = copy.copy(config)
                for key, value in own.items():
                    setattr(sized, key, value)
                layer = self.model.layers[i] = Qwen3DecoderLayer(sized, i)
                for name in () if config.normalised else ("q_norm", "k_norm"):
                    setattr(layer.self_attn, name, nn.Identity())

    return Layered
