"""RMSNorm and LayerNorm."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmexport.export import spec
from llmexport.export.blocks.standard import rms_norm


class Norm(nn.Module):
    weight: Tensor

    def __init__(self, block: spec.Norm) -> None:
        super().__init__()
        self.block = block
        if block.weighted:
            self.weight = nn.Parameter(torch.empty(block.shape))
        elif block.statistics == "rms":
            with torch.device("cpu"):
                self.register_buffer("weight", torch.ones(block.shape))
        self.bias = nn.Parameter(torch.empty(block.shape)) if block.bias else None

    def forward(self, hidden: Tensor) -> Tensor:
        block = self.block
        if block.rows is not None:
            # The operator takes one weight for all rows.
            normed = F.layer_norm(hidden.float(), (block.size,), None, None, block.epsilon)
            return (normed * self.weight.float()).to(hidden.dtype)
        if block.statistics == "layer":
            weight = self.weight.float() if block.weighted else None
            bias = None if self.bias is None else self.bias.float()
            return F.layer_norm(hidden.float(), (block.size,), weight, bias, block.epsilon).to(hidden.dtype)
        if block.rounding == "before_weight" and block.weighted:
            return rms_norm(hidden, self.weight + block.offset if block.offset else self.weight, block.epsilon)
        wide = self.weight.float() + block.offset if block.offset else self.weight.float()
        return rms_norm(hidden.float(), wide, block.epsilon).to(hidden.dtype)
