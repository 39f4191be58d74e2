"""Attention whose queries and keys see the last tokens filtered."""

import torch
from torch import Tensor, nn

from llmexport.export import spec
from llmexport.export.blocks.attention import Attention
from llmexport.export.blocks.delta import carried
from llmexport.export.blocks.norm import Norm


class Pairwise(nn.Module):
    """A causal convolution over two tokens, its weight [out, in, 2, 1] as nn.Conv2d keeps it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, 2, 1))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """x [B, T, in], and before [B, 1, in], the token before its first one."""
        # A product of matrices, which every runtime computes alike: in and the two tokens lie side by side.
        pairs = torch.stack((torch.cat((before, x), 1)[:, : x.shape[1]], x), -1).flatten(-2)
        return nn.functional.linear(pairs, self.weight.reshape(self.weight.shape[0], -1), self.bias)


class LocalizedFilter(nn.Module):
    def __init__(self, block: spec.LocalizedFilter) -> None:
        super().__init__()
        size = block.norm.size
        self.conv1, self.conv2 = Pairwise(size, size // 2), Pairwise(size // 2, size)
        self.output_layernorm = Norm(block.norm)

    def forward(
        self, normed: Tensor, present_tokens: Tensor, tokens_end: Tensor, past_input: Tensor, past_half: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        present = present_tokens.unsqueeze(-1)
        x = normed * present
        # The bias makes something of padding, too.
        half = self.conv1(x, past_input) * present
        filtered = self.output_layernorm(self.conv2(half, past_half) + x)
        # Of a slice TensorRT does not see that it has one row.
        last = x.shape[1] - torch.ones(1, dtype=torch.int64, device=x.device)
        both = ((past_input, x), (past_half, half))
        kept = (carried(past, new, tokens_end, new.index_select(1, last)) for past, new in both)
        return (filtered, *kept)


class FilteredAttention(Attention):
    def __init__(self, block: spec.FilteredAttention) -> None:
        super().__init__(block)
        assert block.filter
        self.lf_gate = LocalizedFilter(block.filter)
        self.filtering = [p.name for p in block.filter.inputs[1:]]

    def forward(self, normed: Tensor, *read: Tensor) -> tuple[Tensor, ...]:
        """`read` is the context and the states, in the order of the block's ports."""
        block, given = self.block, dict(zip(self.names, read, strict=True))
        filtered, *states = self.lf_gate(normed, *(given[n] for n in self.filtering))
        # Head by head a query and a key.
        both = torch.cat((self.q_proj(filtered), self.k_proj(filtered)), -1)
        q, k = both.unflatten(-1, (block.heads, 2, block.head_size)).unbind(-2)
        v = self.v_proj(normed).unflatten(-1, (block.heads, block.head_size))
        return (*self.attend(q, k, v, None, given), *states)
