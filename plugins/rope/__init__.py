"""Rope: rotary position embedding, half-split or interleaved, of the first 2 * R of D dimensions."""

import torch
from torch import Tensor

from llmexport.plugins.spec import Attribute, op


def body(attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int]) -> str | None:
    """In float32, where nothing is rounded between, the standard operator: one node of seven in ONNX Runtime.

    ONNX Runtime 1.23 wants to know the number of heads where not all dimensions turn, and TensorRT-RTX 1.7 does not
    build Llama 4 with the interleaved one.
    """
    if types["x"] != "float32" or 2 * sizes["R"] != sizes["D"] or attributes["interleaved"]:
        return None
    return "y = RotaryEmbedding (x, cos, sin)"


@op(
    "Rope",
    version=1,
    dims={"x": "B H T D", "cos": "B T R", "sin": "B T R"},
    outputs={"y": "B H T D"},
    static=("D", "R"),
    body=body,
)
def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate pairs of x by the angles whose cos and sin are given (arXiv 2104.09864).

    x [B, H, T, D]; cos, sin [B, T, R], 2 * R <= D; dimensions from 2 * R on pass through. Pair i is (x[i], x[R + i]),
    or (x[2i], x[2i + 1]) if interleaved. y is computed in fp32 and rounded once; modeling_llama.py rounds each product,
    too, and modeling_llama4.py does not round cos and sin.
    """
    rotated = 2 * cos.shape[-1]
    c, s = cos.float().unsqueeze(1), sin.float().unsqueeze(1)
    part = x[..., :rotated].float() if rotated < x.shape[-1] else x.float()
    first, second = (part[..., 0::2], part[..., 1::2]) if interleaved else part.chunk(2, -1)
    pair = (first * c - second * s, second * c + first * s)
    y = (torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)).to(x.dtype)
    return torch.cat((y, x[..., rotated:]), -1) if rotated < x.shape[-1] else y
