"""AddRmsNorm: residual add and RMSNorm in one pass over memory; both results are returned."""

import torch
from torch import Tensor

from llmexport.plugins.spec import Attribute, op


def body(attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int]) -> str | None:
    """In float32, where nothing is rounded between, the standard operator: one node of eight in ONNX Runtime."""
    if types["x"] != "float32":
        return None
    offset = float(attributes["weight_offset"])
    scale = f"""offset = Constant <value_float = {offset}> ()
    scale = Add (weight, offset)"""
    return f"""sum = Add (x, residual)
    {scale if offset else "scale = Identity (weight)"}
    y = RMSNormalization <axis = -1, epsilon = {float(attributes["epsilon"])}, stash_type = 1> (sum, scale)"""


@op(
    "AddRmsNorm",
    version=1,
    dims={"x": "B T C", "residual": "B T C", "weight": "C"},
    outputs={"y": "B T C", "sum": "B T C"},
    body=body,
)
def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    epsilon: float,
    weight_offset: float,
    round_before_weight: bool,
) -> tuple[Tensor, Tensor]:
    """sum = x + residual, y = sum / rms(sum) * (weight_offset + weight) (arXiv 1910.07467).

    x, residual [B, T, C]; weight [C]. The sum is rounded to x's dtype and normalised as rounded, in fp32.
    round_before_weight rounds the normalised value to x's dtype before it is multiplied by the weight
    (modeling_llama.py); otherwise the product is formed in fp32 and rounded once (modeling_gemma.py,
    modeling_gpt_oss.py).
    """
    total = x + residual
    wide = total.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    scale = weight.float() + weight_offset
    if round_before_weight:
        return normed.to(x.dtype) * scale.to(x.dtype), total
    return (normed * scale).to(x.dtype), total
