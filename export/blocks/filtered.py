"""Attention whose queries and keys see the last tokens filtered."""

import torch
from torch import Tensor, nn

from llmexport.export import spec
from llmexport.export.blocks.attention import Attention
from llmexport.export.blocks.norm import Norm
from llmexport.export.blocks.shift import shifted


class Pairwise(nn.Module):
    """A causal convolution over two tokens, its weight [out, in, 2, 1] as nn.Conv2d keeps it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, 2, 1))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """Of tokens [B, T, in] and those before them."""
        # A product of matrices, which every runtime computes alike: in and the two tokens lie side by side.
        pairs = torch.stack((before, x), -1).flatten(-2)
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
        x, before, last = shifted(normed, present_tokens, tokens_end, past_input)
        # The bias makes something of padding, too.
        half, half_before, half_last = shifted(self.conv1(x, before), present_tokens, tokens_end, past_half)
        return self.output_layernorm(self.conv2(half, half_before) + x), last, half_last


class FilteredAttention(Attention):
    def __init__(self, block: spec.FilteredAttention) -> None:
        super().__init__(block)
        assert block.filter
        self.lf_gate = LocalizedFilter(block.filter)
        self.filtering = [p.name for p in block.filter.inputs[1:]]

    def forward(self, normed: Tensor, *read: Tensor) -> tuple[Tensor, ...]:
        """`read` is the context and the states, in the order of the block's ports."""
        block, given = self.block, dict(zip(self.names, read, strict=True))
        assert self.k_proj
        assert self.v_proj
        filtered, *states = self.lf_gate(normed, *(given[n] for n in self.filtering))
        # Head by head a query and a key.
        both = torch.cat((self.q_proj(filtered), self.k_proj(filtered)), -1)
        q, k = both.unflatten(-1, (block.heads, 2, block.head_size)).unbind(-2)
        v = self.v_proj(normed).unflatten(-1, (block.heads, block.head_size))
        return (*self.attend(q, k, v, None, given), *states)
