"""QkNormRope: norms and rotary embedding of q and k, and the heads of q, k and v before their tokens."""

import torch
from torch import Tensor

from llmexport.plugins.qk_norm_rope.body import body
from llmexport.plugins.rope import rope
from llmexport.plugins.spec import op


@op(
    "QkNormRope",
    version=1,
    dims={
        "q": "B T H Q",
        "k": "B T G D",
        "v": "B T G D",
        "cos": "B T R",
        "sin": "B T R",
        "q_weight": "D",
        "k_weight": "D",
    },
    outputs={"query": "B H T D", "key": "B G T D", "value": "B G T D"},
    static=("Q", "D", "R"),
    joins=("q", "k", "v"),
    body=body,
)
def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    interleaved: bool,
    epsilon: float,
    weight_offset: float,
    round_before_weight: bool,
    norm_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of a step as attention and a KV cache take them (modeling_qwen3.py, modeling_llama4.py).

    q [B, T, H, Q], of whose heads the first D <= Q numbers are read, as there may be a gate behind
    (modeling_qwen3_next.py); k, v [B, T, G, D]; cos, sin [B, T, R], 2 * R <= D, as Rope reads them; q_weight, k_weight
    [D]. query and key are x / rms(x) * (weight_offset + weight) of each head, then turned; in the other order unless
    norm_first; without weights they are only turned. value is v. Norm and rotation are each computed in fp32 and
    rounded to q's dtype; round_before_weight is that of AddRmsNorm. Raises ValueError if one of the weights is missing.
    """
    if (q_weight is None) != (k_weight is None):
        raise ValueError("QkNormRope norms both q and k, or neither: give both weights, or none")

    def made(x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return rope.reference(x.transpose(1, 2), cos, sin, interleaved)
        if norm_first:
            x = _norm(x, weight, epsilon, weight_offset, round_before_weight)
        x = rope.reference(x.transpose(1, 2), cos, sin, interleaved)
        return x if norm_first else _norm(x, weight, epsilon, weight_offset, round_before_weight)

    return made(q[..., : k.shape[-1]], q_weight), made(k, k_weight), v.transpose(1, 2).clone()


def _norm(x: Tensor, weight: Tensor, epsilon: float, offset: float, round_before_weight: bool) -> Tensor:
    """RMSNorm of the last dimension (arXiv 1910.07467)."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    scale = weight.float() + offset
    return normed.to(x.dtype) * scale.to(x.dtype) if round_before_weight else (normed * scale).to(x.dtype)
