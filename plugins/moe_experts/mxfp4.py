"""MXFP4: 4-bit floats in blocks of 32 that share a power of two (OCP Microscaling Formats 1.0)."""

import torch
from torch import Tensor

# The 16 values of E2M1, by code.
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
BLOCK = 32  # values that share a scale
SCALE_BIAS = 127


def dequantise(packed: Tensor, scales: Tensor) -> Tensor:
    """packed [..., N / 2] and scales [..., N / 32], both uint8, as fp32 values [..., N]; the low nibble is first."""
    table = torch.tensor(VALUES, device=packed.device)
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    blocks = table[codes.int()].unflatten(-1, (-1, BLOCK))
    exponents = scales.to(torch.int32).unsqueeze(-1) - SCALE_BIAS
    return torch.ldexp(blocks, exponents).flatten(-2)
