"""A matrix as checkpoints have it, [out, in] or [in, out], and a factor that most models have not."""

import torch
from torch import Tensor, nn


class Transposed(nn.Module):
    """x @ weight + bias, of a weight [in, out] (Conv1D, transformers pytorch_utils.py)."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        made = x @ self.weight
        return made if self.bias is None else made + self.bias


def linear(inputs: int, outputs: int, bias: bool, transposed: bool = False) -> nn.Module:
    """A projection whose weight is [out, in], or [in, out] if it is `transposed`."""
    return Transposed(inputs, outputs, bias) if transposed else nn.Linear(inputs, outputs, bias=bias)


def times(x: Tensor, factor: float) -> Tensor:
    """x * factor, and no node of the graph where that is 1."""
    return x if factor == 1.0 else x * factor
