"""ChatGLM-6B (THUDM's modeling_chatglm.py of that release; GLM, arXiv 2103.10360).

query_key_value has the rows of a head's query, of its key and of its value, head by head. Each half of a query and of a
key turns by itself: the first by the position, the second by the place in the block. Before the first bos stands the
context: its tokens stand at 0 in the block, and all tokens see them. From bos on a token stands at the position of the
first gMASK, or of the first MASK where there is none, and counts from 1 in the block. What a sublayer gives is added to
its normed input times sqrt(2 layers). Logits of attention are divided by the number of the layer and multiplied again.
A text without bos is read as causal here, and is none to that code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmexport.validate.references.described import Described, attended, computing, turned

SOURCE = "PyTorch in float64, from THUDM's modeling_chatglm.py of ChatGLM-6B"
THETA = 10000.0


def make(config: Mapping[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype, attention: str | None) -> Any:
    held = {n: tensors.pop(n).to(computing(dtype)) for n in [*tensors]}
    heads, layers, hidden = (config[n] for n in ("num_attention_heads", "num_layers", "hidden_size"))
    alpha = (2 * layers) ** 0.5

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ held[name + ".weight"].T + held[name + ".bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        weight, bias = held[name + ".weight"], held[name + ".bias"]
        return F.layer_norm(x, (hidden,), weight, bias, config["layernorm_epsilon"])

    def row(ids: Tensor, positions: Tensor) -> Tensor:
        context, *places = _places(config, ids, positions)
        x = held["transformer.word_embeddings.weight"][ids]
        for i in range(layers):
            name = f"transformer.layers.{i}."
            normed = norm(x, name + "input_layernorm")
            q, k, v = linear(normed, name + "attention.query_key_value").unflatten(-1, (heads, -1)).chunk(3, -1)
            q, k = (
                torch.cat([turned(h, p, THETA) for h, p in zip(x.chunk(2, -1), places, strict=True)], -1)
                for x in (q, k)
            )
            x = normed * alpha + linear(
                attended(q, k, v, v.shape[-1] ** -0.5, prefix=context), name + "attention.dense"
            )
            normed = norm(x, name + "post_attention_layernorm")
            inner = F.gelu(linear(normed, name + "mlp.dense_h_to_4h"), approximate="tanh")
            x = normed * alpha + linear(inner, name + "mlp.dense_4h_to_h")
        return norm(x, "transformer.final_layernorm") @ held["lm_head.weight"].T

    return Described(row, dtype)


def _places(config: Mapping[str, Any], ids: Tensor, positions: Tensor) -> tuple[int, Tensor, Tensor]:
    """How many tokens the context of a text has, and the two places of each token."""
    text = ids.tolist()
    if config["bos_token_id"] not in text:
        return 0, positions, torch.zeros_like(positions)
    context = text.index(config["bos_token_id"])
    blank = next((config[n] for n in ("gmask_token_id", "mask_token_id") if config[n] in text), config["bos_token_id"])
    first, second = positions.clone(), torch.zeros_like(positions)
    first[context:] = positions[text.index(blank)]
    second[context:] = positions[context:] - positions[context] + 1
    return context, first, second
