"""OpenELM (arXiv 2404.14619; apple/OpenELM modeling_openelm.py).

Every layer has its own numbers of heads and its own width. qkv_proj has the rows of the queries, of the keys and of the
values; each head of a query and of a key has an RMSNorm before it turns. ffn.proj_1 has the rows of the gate and then
those that go up. The head is the table of words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmexport.validate.references.described import Described, attended, computing, rms_norm, turned

SOURCE = "PyTorch in float64, from Apple's modeling_openelm.py"
EPSILON = 1e-6


def make(config: Mapping[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype, attention: str | None) -> Any:
    held = {n: tensors.pop(n).to(computing(dtype)) for n in [*tensors]}
    words = held["transformer.token_embeddings.weight"]
    head = words if config.get("share_input_output_layers", True) else held["lm_head.weight"]
    size, theta = config["head_dim"], float(config.get("rope_freq_constant", 10000))
    counts = list(zip(config["num_query_heads"], config["num_kv_heads"], strict=True))

    def row(ids: Tensor, positions: Tensor) -> Tensor:
        x = words[ids]
        for i, (heads, keys) in enumerate(counts):
            name = f"transformer.layers.{i}."
            normed = rms_norm(x, held[name + "attn_norm.weight"], EPSILON)
            together = (normed @ held[name + "attn.qkv_proj.weight"].T).unflatten(-1, (-1, size))
            q, k, v = together.split([heads, keys, keys], 1)
            if config.get("normalize_qk_projections", True):
                q = rms_norm(q, held[name + "attn.q_norm.weight"], EPSILON)
                k = rms_norm(k, held[name + "attn.k_norm.weight"], EPSILON)
            mixed = attended(turned(q, positions, theta), turned(k, positions, theta), v, size**-0.5)
            x = x + mixed @ held[name + "attn.out_proj.weight"].T
            normed = rms_norm(x, held[name + "ffn_norm.weight"], EPSILON)
            gate, up = (normed @ held[name + "ffn.proj_1.weight"].T).chunk(2, -1)
            x = x + (F.silu(gate) * up) @ held[name + "ffn.proj_2.weight"].T
        return rms_norm(x, held["transformer.norm.weight"], EPSILON) @ head.T

    return Described(row, dtype)
