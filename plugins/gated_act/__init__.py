"""GatedAct: the elementwise middle of a gated MLP, act(gate) * up."""

import torch
import torch.nn.functional as F
from torch import Tensor

from llmexport.plugins.spec import op

ACTIVATIONS = ("silu", "gelu_tanh", "gelu_erf", "swiglu_clamped")


@op(
    "GatedAct",
    version=1,
    dims={"gate": "B T J", "up": "B T I"},
    outputs={"y": "B T I"},
    choices={"activation": ACTIVATIONS},
    joins=("gate", "up"),
)
def gated_act(gate: Tensor, up: Tensor | None, activation: str, alpha: float, limit: float) -> Tensor:
    """activation(gate) * up (arXiv 2002.05202), for gate and up [B, T, I], in fp32 and rounded once.

    Without up, gate is [B, T, 2 I] and has up behind itself (modeling_phi3.py).

    transformers rounds activation(gate), too (LlamaMLP), or every step (GptOssExperts).
    activation is "silu", "gelu_tanh" or "gelu_erf"; or "swiglu_clamped", which is
    gate * sigmoid(alpha * gate) * (up + 1) with gate <= limit and |up| <= limit (modeling_gpt_oss.py). Only
    swiglu_clamped reads alpha and limit. Raises ValueError on any other activation.
    """
    g, u = (x.float() for x in (gate.chunk(2, -1) if up is None else (gate, up)))
    if activation == "silu":
        y = F.silu(g) * u
    elif activation == "gelu_tanh":
        y = F.gelu(g, approximate="tanh") * u
    elif activation == "gelu_erf":
        y = F.gelu(g) * u
    elif activation == "swiglu_clamped":
        g, u = g.clamp(max=limit), u.clamp(-limit, limit)
        y = g * torch.sigmoid(alpha * g) * (u + 1)
    else:
        raise ValueError(f"GatedAct knows no activation {activation!r}")
    return y.to(gate.dtype)
