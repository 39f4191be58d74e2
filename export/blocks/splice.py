"""Where pictures enter a text."""

import torch
from torch import Tensor, nn

from llmexport.export import spec


class Splice(nn.Module):
    def __init__(self, block: spec.Splice) -> None:
        super().__init__()
        self.block = block

    def forward(self, input_ids: Tensor, hidden: Tensor, features: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        visual = input_ids == self.block.tokens[0]
        for token in self.block.tokens[1:]:
            visual = visual | (input_ids == token)
        # Where a model says such a token itself, no picture stands behind it.
        visual = visual & (torch.scalar_tensor(features.shape[0], dtype=torch.int64, device=features.device) > 0)
        # Row 0 is for all other tokens, and there may be no features at all.
        rows = torch.cat((torch.zeros_like(hidden[0, :1]), features))
        row = torch.cumsum(visual.flatten().to(torch.int64), 0) * visual.flatten()
        spliced = torch.where(visual.unsqueeze(-1), rows.index_select(0, row).view_as(hidden), hidden)
        if not self.block.numbered:
            return spliced
        # Those of one picture have the same number of other tokens before them.
        before = torch.cumsum(torch.logical_not(visual).to(torch.int64), 1)
        return spliced, (before + 1) * visual.to(torch.int64)
