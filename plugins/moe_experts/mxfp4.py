"""MXFP4: 4-bit floats in blocks of 32 that share a power of two."""

import torch
from torch import Tensor

from llmexport.plugins.microscaling import BLOCK, SCALE_BIAS, VALUES


def dequantise(packed: Tensor, scales: Tensor) -> Tensor:
    """packed [..., N / 2] and scales [..., N / 32], both uint8, as fp32 values [..., N]; the low nibble is first."""
    table = torch.tensor(VALUES, device=packed.device)
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    blocks = table[codes.int()].unflatten(-1, (-1, BLOCK))
    exponents = scales.to(torch.int32).unsqueeze(-1) - SCALE_BIAS
    return torch.ldexp(blocks, exponents).flatten(-2)
