"""What is added to the logits of attention."""

import math

import torch
from torch import Tensor, nn

from llmexport.export import spec
from llmexport.export.blocks.context import slots_of_step, tokens_up_to


def slopes(heads: int) -> Tensor:
    """ALiBi's slope of each head [heads], fp32."""
    below = 2 ** math.floor(math.log2(heads))
    exponents = torch.arange(1, below + 1) * (8 / below)
    between = torch.arange(1, 2 * (heads - below) + 1, 2) * (4 / below)
    return torch.pow(2.0, -torch.cat((exponents, between)))


class Alibi(nn.Module):
    slopes: Tensor

    def __init__(self, block: spec.Alibi, dtype: torch.dtype) -> None:
        super().__init__()
        self.block, self.dtype = block, dtype
        with torch.device("cpu"):
            steep = slopes(block.heads)
            self.register_buffer("slopes", (_rounded(steep) if block.rounded else steep).unsqueeze(1))

    def forward(self, *read: Tensor) -> Tensor:
        """`read` is what says where the step stands, its tokens [B, T], and the mask [B, 1, T, S]."""
        *where, input_ids, mask = read
        if self.block.keys:
            padding, written = (x.unsqueeze(1) for x in where)
            keys = torch.arange(mask.shape[-1], device=mask.device) - padding
            queries = torch.arange(input_ids.shape[1], device=mask.device) + written - padding
        else:
            keys = tokens_up_to(where[0]) - 1
            queries = keys.index_select(1, slots_of_step(where[0], input_ids))
        if self.block.rounded:
            key, query = (_rounded(self.slopes * _rounded(x.unsqueeze(1).float())) for x in (keys, queries))
            bias = key.unsqueeze(2) - query.unsqueeze(3)
        else:
            bias = self.slopes.unsqueeze(2) * (keys.unsqueeze(1) - queries.unsqueeze(2)).unsqueeze(1)
        bias = bias if self.block.scale == 1.0 else bias * self.block.scale
        return torch.where(mask, bias.to(self.dtype), torch.finfo(self.dtype).min)


def _rounded(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).float()
