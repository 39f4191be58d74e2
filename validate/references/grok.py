"""Grok-1 (xai-org/grok-1 model.py), by the names of its conversion to PyTorch (hpcai-tech/grok-1).

Embeddings are multiplied; a layer norms what attention and experts read and what they give; logits of attention are
multiplied and bounded by tanh; the two experts of a token have the weights of a softmax over all, and GELU is by tanh,
JAX's own; `linear` is what it takes, `linear_v` what it multiplies. The head is the table of words, and multiplied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmexport.validate.references.described import Described, attended, computing, rms_norm, turned

SOURCE = "PyTorch in float64, from xai-org/grok-1 model.py"
THETA = 10000.0


def make(config: Mapping[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype, attention: str | None) -> Any:
    held = {n: tensors.pop(n).to(computing(dtype)) for n in [*tensors]}
    words, epsilon = held["model.embed_tokens.weight"], config.get("rms_norm_eps", 1e-5)
    head = held.get("lm_head.weight", words)
    chosen = config.get("num_experts_per_tok", 2)
    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]

    def normed(x: Tensor, name: str) -> Tensor:
        return rms_norm(x, held[f"{name}.scale"], epsilon)

    def heads_of(x: Tensor, name: str, count: int) -> Tensor:
        return (x @ held[name].T).unflatten(-1, (count, -1))

    def experts(x: Tensor, name: str) -> Tensor:
        scores = (x @ held[name + "gate.weight"].T).double().softmax(-1)
        weights, which = scores.topk(chosen, -1)
        made = torch.zeros_like(x)
        for token, place in ((t, p) for t in range(len(x)) for p in range(chosen)):
            expert = f"{name}experts.{int(which[token, place])}."
            inner = F.gelu(x[token] @ held[expert + "linear.weight"].T, approximate="tanh")
            inner = inner * (x[token] @ held[expert + "linear_v.weight"].T)
            made[token] += (weights[token, place] * (inner @ held[expert + "linear_1.weight"].T)).to(x.dtype)
        return made

    def row(ids: Tensor, positions: Tensor) -> Tensor:
        x = words[ids] * config["embedding_multiplier_scale"]
        for i in range(config["num_hidden_layers"]):
            name = f"model.layers.{i}."
            given = normed(x, name + "pre_attn_norm")
            q, k = (
                turned(heads_of(given, f"{name}attn.{n}_proj.weight", c), positions, THETA)
                for n, c in (("q", heads), ("k", keys))
            )
            v = heads_of(given, name + "attn.v_proj.weight", keys)
            mixed = attended(q, k, v, config["attn_output_multiplier"], config["max_attn_value"])
            x = x + normed(mixed @ held[name + "attn.o_proj.weight"].T, name + "post_attn_norm")
            x = x + normed(experts(normed(x, name + "pre_moe_norm"), name + "moe_block."), name + "post_moe_norm")
        return normed(x, "model.norm") @ head.T * config["output_multiplier_scale"]

    return Described(row, dtype)
