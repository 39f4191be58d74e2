"""GatedRmsNorm: RMSNorm of every head, times the activation of a gate."""

import torch
import torch.nn.functional as F
from torch import Tensor

from llmexport.plugins.spec import op


@op(
    "GatedRmsNorm",
    version=1,
    dims={"x": "B T H D", "gate": "B T H D", "weight": "D"},
    outputs={"y": "B T H D"},
    choices={"activation": ("silu", "sigmoid")},
    joins=("gate",),
)
def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, epsilon: float, activation: str, round_before_weight: bool
) -> Tensor:
    """x / rms(x) * weight * activation(gate) (modeling_qwen3_5_moe.py, RMSNormGated).

    x, gate [B, T, H, D]; weight [D]. Statistics, activation and the product with it are fp32. round_before_weight
    rounds the normalised value to x's dtype before it is multiplied by the weight, and that product too, as Qwen3.5
    does; otherwise all is fp32 and rounded once. activation is "silu" or "sigmoid". Raises ValueError on any other.
    """
    if activation not in ("silu", "sigmoid"):
        raise ValueError(f"GatedRmsNorm knows no activation {activation!r}")
    wide, g = x.float(), gate.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    weighted = (normed.to(x.dtype) * weight).float() if round_before_weight else normed * weight.float()
    return (weighted * (F.silu(g) if activation == "silu" else torch.sigmoid(g))).to(x.dtype)
