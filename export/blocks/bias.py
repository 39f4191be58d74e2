"""What is added to the logits of attention."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmexport.export import spec
from llmexport.export.blocks.context import slots_of_step
from llmexport.export.blocks.linear import times
from llmexport.export.blocks.padding import tokens_up_to

# Every dtype holds it as it is, and its exponential is zero beside that of any logit.
HIDDEN = -(2.0**15)


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
        return torch.where(mask, times(bias, self.block.scale).to(self.dtype), HIDDEN)


def _rounded(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).float()


def bucket_table(block: spec.RelativeBias) -> Tensor:
    """The bucket of each place of a key less that of a query, from -distance to distance, int64.

    Logarithms are those of fp32 here, as modeling_t5.py has them, so that no backend rounds one to another bucket.
    """
    apart = torch.arange(-block.distance, block.distance + 1)
    buckets, behind, first = block.buckets, -apart.clamp(max=0), torch.zeros_like(apart)
    if block.both_ways:
        buckets //= 2
        behind, first = apart.abs(), (apart > 0) * buckets
    exact = buckets // 2
    grown = torch.log(behind.float() / exact) / math.log(block.distance / exact) * (buckets - exact)
    far = (exact + grown.clamp(min=0).to(torch.int64)).clamp(max=buckets - 1)
    return first + torch.where(behind < exact, behind, far)


class RelativeBias(nn.Module):
    table: Tensor

    def __init__(self, block: spec.RelativeBias) -> None:
        super().__init__()
        self.distance = block.distance
        self.weight = nn.Parameter(torch.empty(block.buckets, block.heads))
        with torch.device("cpu"):
            self.register_buffer("table", bucket_table(block))

    def forward(self, mask: Tensor) -> Tensor:
        tokens, keys = mask.shape[2:]
        query = torch.arange(tokens, device=mask.device) + (keys - tokens)
        apart = torch.arange(keys, device=mask.device) - query.unsqueeze(1)
        buckets = F.embedding(apart.clamp(-self.distance, self.distance) + self.distance, self.table.unsqueeze(1))
        bias = F.embedding(buckets.squeeze(-1), self.weight).permute(2, 0, 1)
        return torch.where(mask, bias, HIDDEN)
