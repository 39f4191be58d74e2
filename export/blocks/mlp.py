"""The gated MLP."""

import functools
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from llmexport.export import spec

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "gelu_erf": F.gelu,
}


class Mlp(nn.Module):
    def __init__(self, block: spec.Mlp) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[block.activation]
        self.gate_proj = nn.Linear(block.hidden, block.intermediate, bias=block.bias)
        self.up_proj = nn.Linear(block.hidden, block.intermediate, bias=block.bias)
        self.down_proj = nn.Linear(block.intermediate, block.hidden, bias=block.bias)

    def forward(self, normed: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(normed)) * self.up_proj(normed))
