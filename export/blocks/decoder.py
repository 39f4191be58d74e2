"""The two ends of a decoder and the layer between them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmexport.export import spec
from llmexport.export.blocks.attention import Attention
from llmexport.export.blocks.mlp import Mlp
from llmexport.export.blocks.norm import Norm


class Embedding(nn.Module):
    def __init__(self, block: spec.Embedding, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(block.vocabulary, block.hidden))
        # Gemma rounds the scale to the weight's dtype before it multiplies.
        self.scale = float(torch.tensor(block.scale, dtype=dtype, device="cpu"))

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = F.embedding(input_ids, self.weight)
        return hidden if self.scale == 1.0 else hidden * self.scale


class DecoderLayer(nn.Module):
    def __init__(self, block: spec.DecoderLayer) -> None:
        super().__init__()
        self.input_layernorm = Norm(block.input_norm)
        self.self_attn = Attention(block.attention)
        self.post_attention_layernorm = Norm(block.post_attention_norm)
        self.mlp = Mlp(block.mlp)

    def forward(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past_key: Tensor, past_value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        normed = self.input_layernorm(hidden)
        attended, key, value = self.self_attn(normed, cos, sin, mask, past_key, past_value)
        hidden = hidden + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), key, value


class Head(nn.Module):
    def __init__(self, block: spec.Head) -> None:
        super().__init__()
        self.norm = Norm(block.norm)
        self.projection = nn.Linear(block.norm.size, block.vocabulary, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.projection(self.norm(hidden))
