"""The MLP, gated or not."""

import functools
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from llmexport.export import spec

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "gelu_erf": F.gelu,
    "relu": F.relu,
}


class Mlp(nn.Module):
    def __init__(self, block: spec.Mlp) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[block.activation]
        self.block = block
        if block.fused:
            self.gate_up_proj = nn.Linear(block.hidden, 2 * block.intermediate, bias=block.bias)
        else:
            if block.gated:
                self.gate_proj = nn.Linear(block.hidden, block.intermediate, bias=block.bias)
            self.up_proj = nn.Linear(block.hidden, block.intermediate, bias=block.bias)
        self.down_proj = nn.Linear(block.intermediate, block.hidden, bias=block.bias)

    def forward(self, normed: Tensor) -> Tensor:
        if not self.block.gated:
            return self.down_proj(self.activation(self.up_proj(normed)))
        fused = self.block.fused
        gate, up = self.gate_up_proj(normed).chunk(2, -1) if fused else (self.gate_proj(normed), self.up_proj(normed))
        return self.down_proj(self.activation(gate) * up)
