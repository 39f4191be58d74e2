"""RWKV-7 (arXiv 2503.14456; BlinkDL's rwkv/model.py, RWKV_x070), in the names of its Hugging Face checkpoints.

What is projected are mixtures of a token and the one before it, zeros before the first. Of a head's state S, [values,
keys], a token makes S (diag(d) - kappa^T (a kappa)) + v^T k, with d = exp(-exp(-1/2) sigmoid(w)), and reads S r. kappa
is k * k_k of length one, head by head, k is then k (1 + (a - 1) k_a), and v of all but the first layer moves towards
the first layer's by sigmoid of its LoRA. What is read is normed head by head, (r k r_k) v is added, and the gate
multiplies. Checked once: of 130 tokens through 3 layers of random weights, the logits of the package rwkv 0.8.32 (cpu
fp32) are these to 1.5e-06, 3.6e-07 of their rms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmexport.validate.references.described import Described, computing

SOURCE = "PyTorch in float64, from BlinkDL's rwkv/model.py"


def make(config: Mapping[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype, attention: str | None) -> Any:
    held = {n: tensors.pop(n).to(computing(dtype)) for n in [*tensors]}
    size, epsilon, layers = config["head_dim"], config["norm_eps"], config["num_hidden_layers"]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], held[name + ".weight"], held.get(name + ".bias"), epsilon)

    def lora(x: Tensor, name: str, between: Any = lambda x: x) -> Tensor:
        return between(x @ held[f"{name}.lora.0.weight"].T) @ held[f"{name}.lora.2.weight"].T

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, size))

    def mixed(x: Tensor, weight: str) -> Tensor:
        before = F.pad(x, (0, 0, 1, 0))[:-1]
        return x + (before - x) * held[weight].flatten()

    def time_mix(x: Tensor, own: str, first: Tensor | None) -> tuple[Tensor, Tensor]:
        xr, xw, xk, xv, xa, xg = (mixed(x, f"{own}x_{n}") for n in "rwkvag")
        r, k, v = (at @ held[f"{own}{n}_proj.weight"].T for at, n in ((xr, "r"), (xk, "k"), (xv, "v")))
        w = lora(xw, own + "w_lora", torch.tanh) + held[own + "w_lora.lora.2.bias"]
        a = torch.sigmoid(lora(xa, own + "a_lora") + held[own + "a_lora.lora.2.bias"])
        kappa = F.normalize(heads(k * held[own + "k_k"]), dim=-1)
        k = k * (1 + (a - 1) * held[own + "k_a"])
        if first is not None:
            v = v + (first - v) * torch.sigmoid(lora(xv, own + "v_lora") + held[own + "v_lora.lora.2.bias"])
        decay = torch.exp(-math.exp(-0.5) * torch.sigmoid(w.double()))
        read = recalled(heads(r), heads(decay), heads(k), heads(v), kappa, heads(a)).to(x.dtype)
        normed = F.group_norm(
            read.flatten(1), read.shape[1], held[own + "g_norm.weight"], held[own + "g_norm.bias"], size * epsilon
        )
        bonus = (heads(r * k) * held[own + "r_k"]).sum(-1, keepdim=True) * heads(v)
        gate = lora(xg, own + "g_lora", torch.sigmoid)
        return ((normed + bonus.flatten(1)) * gate) @ held[own + "o_proj.weight"].T, v

    def row(ids: Tensor, positions: Tensor) -> Tensor:
        words, first = held["model.embeddings.weight"], None
        x = words[ids]
        if config.get("norm_first", True):
            x = norm(x, "model.layers.0.pre_norm")
        for i in range(layers):
            name = f"model.layers.{i}."
            made, value = time_mix(norm(x, name + "attn_norm"), name + "attn.", first)
            first = value if first is None else first
            x = x + made
            keys = mixed(norm(x, name + "ffn_norm"), name + "ffn.x_k") @ held[name + "ffn.key.weight"].T
            x = x + torch.relu(keys).square() @ held[name + "ffn.value.weight"].T
        head = words if config.get("tie_word_embeddings") else held["lm_head.weight"]
        return norm(x, "model.norm") @ head.T

    return Described(row, dtype)


def recalled(r: Tensor, decay: Tensor, k: Tensor, v: Tensor, kappa: Tensor, a: Tensor) -> Tensor:
    """What each token reads of the state that it leaves, [T, H, V], in float64."""
    r, decay, k, v, kappa, a = (x.double() for x in (r, decay, k, v, kappa, a))
    state, read = v.new_zeros(*v.shape[1:], k.shape[-1]), torch.zeros_like(v)
    for t in range(len(r)):
        removed = (state @ kappa[t, :, :, None]) * (a[t] * kappa[t])[:, None]
        state = state * decay[t, :, None] - removed + v[t, :, :, None] * k[t, :, None]
        read[t] = (state @ r[t, :, :, None])[..., 0]
    return read
