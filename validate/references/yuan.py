"""Yuan 2.0 (arXiv 2311.15786; IEITYuan's yuan_hf_model.py).

Queries and keys are made of norm(x + conv2(conv1(x))), two causal convolutions over two tokens each with zeros before
the first, values of x. q_proj and k_proj give one row of numbers together, which is cut into heads before each head is
cut into its query and its key. The MLP is down(gate(x) * silu(up(x))).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmexport.validate.references.described import Described, attended, computing, rms_norm, turned

SOURCE = "PyTorch in float64, from IEITYuan's yuan_hf_model.py"
FILTER_EPSILON, THETA = 1e-6, 10000.0


def make(config: Mapping[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype, attention: str | None) -> Any:
    held = {n: tensors.pop(n).to(computing(dtype)) for n in [*tensors]}
    words, epsilon, heads = held["model.embed_tokens.weight"], config["rms_norm_eps"], config["num_attention_heads"]

    def two(x: Tensor, name: str) -> Tensor:
        """A convolution over each token and the one before it."""
        weight, before = held[name + ".weight"], F.pad(x, (0, 0, 1, 0))[:-1]
        return before @ weight[:, :, 0, 0].T + x @ weight[:, :, 1, 0].T + held[name + ".bias"]

    def row(ids: Tensor, positions: Tensor) -> Tensor:
        x = words[ids]
        for i in range(config["num_hidden_layers"]):
            name = f"model.layers.{i}."
            normed, own = rms_norm(x, held[name + "input_layernorm.weight"], epsilon), name + "self_attn."
            v = (normed @ held[own + "v_proj.weight"].T).unflatten(-1, (heads, -1))
            filtered = normed + two(two(normed, own + "lf_gate.conv1"), own + "lf_gate.conv2")
            filtered = rms_norm(filtered, held[own + "lf_gate.output_layernorm.weight"], FILTER_EPSILON)
            both = torch.cat([filtered @ held[f"{own}{n}_proj.weight"].T for n in "qk"], -1)
            q, k = (turned(h, positions, THETA) for h in both.unflatten(-1, (heads, -1)).chunk(2, -1))
            x = x + attended(q, k, v, v.shape[-1] ** -0.5) @ held[own + "o_proj.weight"].T
            normed, own = rms_norm(x, held[name + "post_attention_layernorm.weight"], epsilon), name + "mlp."
            inner = normed @ held[own + "gate_proj.weight"].T * F.silu(normed @ held[own + "up_proj.weight"].T)
            x = x + inner @ held[own + "down_proj.weight"].T
        head = words if config.get("tie_word_embeddings") else held["lm_head.weight"]
        return rms_norm(x, held["model.norm.weight"], epsilon) @ head.T

    return Described(row, dtype)
