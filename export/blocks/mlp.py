"""The MLP, gated or not."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmexport.export import spec
from llmexport.export.blocks.linear import linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "gelu_erf": F.gelu,
    "gelu_sigmoid": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


class Mlp(nn.Module):
    def __init__(self, block: spec.Mlp) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[block.activation]
        self.block = block
        hidden, intermediate, bias, turn = block.hidden, block.intermediate, block.bias, block.transposed
        if block.fused:
            self.gate_up_proj = linear(hidden, 2 * intermediate, bias, turn)
        else:
            if block.gated:
                self.gate_proj = linear(hidden, intermediate, bias, turn)
            self.up_proj = linear(hidden, intermediate, bias, turn)
        self.down_proj = linear(intermediate, hidden, bias, turn)

    def forward(self, normed: Tensor) -> Tensor:
        down: Tensor = self.down_proj(self.mixed(normed))
        return down

    def mixed(self, normed: Tensor) -> Tensor:
        """What is projected down."""
        if not self.block.gated:
            return self.activation(self.up_proj(normed))
        fused = self.block.fused
        both = self.gate_up_proj(normed).chunk(2, -1) if fused else (self.gate_proj(normed), self.up_proj(normed))
        product: Tensor = self.activation(both[0]) * both[1]
        return product
