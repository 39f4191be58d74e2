"""What each layer is told of its tokens beside the hidden states."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmexport.export import spec
from llmexport.export.blocks.mlp import ACTIVATIONS
from llmexport.export.blocks.norm import Norm


class PerLayerEmbedding(nn.Module):
    def __init__(self, block: spec.PerLayerEmbedding, dtype: torch.dtype) -> None:
        super().__init__()
        self.block, width = block, block.layers * block.norm.size
        self.weight = nn.Parameter(torch.empty(block.vocabulary, width))
        # The reference rounds the scale to the weight's dtype before it multiplies.
        self.scale = float(torch.tensor(block.norm.size**0.5, dtype=dtype, device="cpu"))
        self.projection = nn.Linear(block.hidden, width, bias=False)
        self.norm = Norm(block.norm)

    def forward(self, input_ids: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
        by_layer = (self.block.layers, self.block.norm.size)
        table = (F.embedding(input_ids, self.weight) * self.scale).unflatten(-1, by_layer)
        projected = (self.projection(hidden) * self.block.hidden**-0.5).unflatten(-1, by_layer)
        return ((self.norm(projected) + table) * 2**-0.5).unbind(2)


class PerLayerInput(nn.Module):
    def __init__(self, block: spec.PerLayerInput) -> None:
        super().__init__()
        self.gate = nn.Linear(block.hidden, block.size, bias=False)
        self.activation = ACTIVATIONS[block.activation]
        self.projection = nn.Linear(block.size, block.hidden, bias=False)

    def forward(self, hidden: Tensor, layer_input: Tensor) -> Tensor:
        made: Tensor = self.projection(self.activation(self.gate(hidden)) * layer_input)
        return made
