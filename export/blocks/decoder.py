"""The two ends of a model."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmexport.export import spec
from llmexport.export.blocks.linear import times
from llmexport.export.blocks.mlp import ACTIVATIONS
from llmexport.export.blocks.norm import Norm


class Embedding(nn.Module):
    def __init__(self, block: spec.Embedding, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(block.vocabulary, block.inner or block.hidden))
        # Gemma rounds the scale to the weight's dtype before it multiplies.
        self.scale = float(torch.tensor(block.scale, dtype=dtype, device="cpu"))
        self.inner_proj = nn.Linear(block.inner, block.hidden, bias=False) if block.inner else None
        self.types = nn.Embedding(block.types, block.hidden) if block.types else None
        self.positions = nn.Embedding(block.positions, block.hidden) if block.positions else None
        self.offset, self.masked, self.names = block.offset, block.masked, [p.name for p in block.inputs]
        self.norm = Norm(block.norm) if block.norm else None

    def forward(self, *read: Tensor) -> Tensor:
        given = dict(zip(self.names, read, strict=True))
        input_ids = given["input_ids"]
        hidden = times(F.embedding(input_ids, self.weight), self.scale)
        if self.inner_proj:
            hidden = self.inner_proj(hidden)
        if self.types:
            hidden = hidden + self.types(given["token_type_ids"])
        if self.positions and self.offset is not None:
            hidden = hidden + self.positions(given["position_ids"] + self.offset)
        elif self.positions:
            # Not a slice, which ends with the table and lets longer rows read too little.
            hidden = hidden + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        hidden = self.norm(hidden) if self.norm else hidden
        return hidden * (given["attention_mask"] != 0).unsqueeze(-1).to(hidden.dtype) if self.masked else hidden


class Head(nn.Module):
    def __init__(self, block: spec.Head) -> None:
        super().__init__()
        self.softcap, self.scale, self.last, size = block.softcap, block.scale, block.last, block.size
        self.normed = block.normed
        self.transform = nn.Linear(size, size) if block.transform else None
        self.activation = ACTIVATIONS[block.transform] if block.transform else None
        self.norm = Norm(block.norm) if block.norm else None
        self.inner_proj = nn.Linear(size, block.inner, bias=False) if block.inner else None
        self.projection = nn.Linear(block.inner or size, block.vocabulary, bias=block.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.last:
            # Of a slice TensorRT does not see that it has one row, and from the end its Gather does not count.
            place = hidden.shape[1] - torch.ones(1, dtype=torch.int64, device=hidden.device)
            hidden = hidden.index_select(1, place)
        if self.transform and self.activation:
            hidden = self.activation(self.transform(hidden))
        if self.norm:
            hidden = self.norm(hidden)
        if self.inner_proj:
            hidden = self.inner_proj(hidden)
        logits = times(F.linear(hidden, self._rows()) if self.normed else self.projection(hidden), self.scale)
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits

    def _rows(self) -> Tensor:
        """The projection with rows of length one, or zero, in fp32 inside."""
        weight = self.projection.weight.float()
        length = weight.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-12)
        return (weight / length).to(self.projection.weight.dtype)
