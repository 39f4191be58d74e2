"""The two ends of a decoder."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmexport.export import spec
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


class Head(nn.Module):
    def __init__(self, block: spec.Head) -> None:
        super().__init__()
        self.softcap, self.scale = block.softcap, block.scale
        self.norm = Norm(block.norm)
        self.projection = nn.Linear(block.norm.size, block.vocabulary, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.projection(self.norm(hidden))
        logits = logits if self.scale == 1.0 else logits * self.scale
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits
