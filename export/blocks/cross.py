"""Attention to the text that an encoder has read."""

from torch import Tensor, nn

from llmexport.export import spec
from llmexport.export.blocks.context import seen_by_all
from llmexport.export.blocks.standard import attention


class CrossKeys(nn.Module):
    def __init__(self, block: spec.CrossKeys) -> None:
        super().__init__()
        self.heads = (block.heads, block.head_size)
        self.k_proj = nn.Linear(block.hidden, block.heads * block.head_size, bias=False)
        self.v_proj = nn.Linear(block.hidden, block.heads * block.head_size, bias=False)

    def forward(self, encoded: Tensor) -> tuple[Tensor, ...]:
        return tuple(p(encoded).unflatten(-1, self.heads).transpose(1, 2) for p in (self.k_proj, self.v_proj))


class CrossMask(nn.Module):
    def forward(self, encoder_attention_mask: Tensor, decoder_input_ids: Tensor) -> Tensor:
        return seen_by_all(encoder_attention_mask, decoder_input_ids)


class CrossAttention(nn.Module):
    def __init__(self, block: spec.CrossAttention) -> None:
        super().__init__()
        self.block = block
        self.q_proj = nn.Linear(block.hidden, block.heads * block.head_size, bias=False)
        self.o_proj = nn.Linear(block.heads * block.head_size, block.hidden, bias=False)

    def forward(self, normed: Tensor, cross_key: Tensor, cross_value: Tensor, cross_mask: Tensor) -> Tensor:
        block = self.block
        q = self.q_proj(normed).unflatten(-1, (block.heads, block.head_size)).transpose(1, 2)
        mixed = attention(q, cross_key, cross_value, cross_mask, block.scale)
        attended: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return attended
