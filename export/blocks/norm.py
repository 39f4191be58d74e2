"""RMSNorm."""

import torch
from torch import Tensor, nn

from llmexport.export import spec
from llmexport.export.blocks.standard import rms_norm


class Norm(nn.Module):
    def __init__(self, block: spec.Norm) -> None:
        super().__init__()
        self.block = block
        self.weight = nn.Parameter(torch.empty(block.size))

    def forward(self, hidden: Tensor) -> Tensor:
        weight, block = self.weight, self.block
        if block.rounding == "before_weight":
            return rms_norm(hidden, weight + block.offset if block.offset else weight, block.epsilon)
        wide = weight.float() + block.offset if block.offset else weight.float()
        return rms_norm(hidden.float(), wide, block.epsilon).to(hidden.dtype)
