"""AddRmsNorm: residual add and RMSNorm in one pass over memory; both results are returned."""

import torch
from torch import Tensor

from llmexport.plugins.norm_body import rms_norm
from llmexport.plugins.spec import Attribute, op


def body(attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int]) -> str:
    inner = "inner" in types
    return f"""
    {rms_norm("x", "inner", "summand", "x", attributes, types) if inner else ""}
    sum = Add ({"summand" if inner else "x"}, residual)
    {rms_norm("sum", "weight", "y", "x", attributes, types)}"""


@op(
    "AddRmsNorm",
    version=1,
    dims={"x": "B T C", "residual": "B T C", "weight": "C", "inner": "C"},
    outputs={"y": "B T C", "sum": "B T C"},
    body=body,
)
def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    inner: Tensor | None,
    epsilon: float,
    weight_offset: float,
    round_before_weight: bool,
) -> tuple[Tensor, Tensor]:
    """sum = x + residual, y = sum / rms(sum) * (weight_offset + weight) (arXiv 1910.07467).

    x, residual [B, T, C]; weight [C]. The sum is rounded to x's dtype and normalised as rounded, in fp32.
    round_before_weight rounds the normalised value to x's dtype before it is multiplied by the weight
    (modeling_llama.py); otherwise the product is formed in fp32 and rounded once (modeling_gemma.py,
    modeling_gpt_oss.py). With inner [C] x is normalised first, as the sum is but by inner, and rounded before it is
    added: x / rms(x) * (weight_offset + inner) (modeling_gemma2.py, modeling_glm4.py).
    """

    def norm(value: Tensor, weight: Tensor) -> Tensor:
        wide = value.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        scale = weight.float() + weight_offset
        if round_before_weight:
            return normed.to(x.dtype) * scale.to(x.dtype)
        return (normed * scale).to(x.dtype)

    total = (x if inner is None else norm(x, inner)) + residual
    return norm(total, weight), total
