"""Where the tokens of a text stand that goes on in a blank."""

import torch
from torch import Tensor, nn

from llmexport.export import spec
from llmexport.export.blocks.context import slots_of_step
from llmexport.export.blocks.static import step_slots

BEYOND = 2**31  # every position


class Passage(nn.Module):
    def __init__(self, block: spec.Passage) -> None:
        super().__init__()
        self.block = block

    def forward(self, *read: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`read` is what says where the step stands in its rows, then tokens, positions and state."""
        *where, input_ids, position_ids, past = read
        present = self._present(where, input_ids)
        firsts = [
            _first(torch.logical_and(present, input_ids == t), position_ids)
            for t in (self.block.begins, *self.block.blanks)
        ]
        found = torch.where(past > 0, past, torch.stack(firsts, 1))
        begins, *blanks = found.split(1, 1)
        blank = begins
        for later in reversed(blanks):
            blank = torch.where(later > 0, later, blank)
        behind = torch.logical_and(begins > 0, position_ids + 1 >= begins)
        places = (torch.where(behind, blank - 1, position_ids), torch.where(behind, position_ids + 2 - begins, 0))
        new = torch.logical_and(begins > 0, past[:, :1] == 0)
        shown = torch.logical_and(torch.logical_and(present, new), torch.logical_not(behind))
        return torch.stack(places), shown, found

    def _present(self, where: list[Tensor], input_ids: Tensor) -> Tensor:
        """Which tokens of the step are no padding [B, T]."""
        if self.block.static:
            padding_length, past_length = where
            return step_slots(past_length, input_ids) >= padding_length.unsqueeze(1)
        [attention_mask] = where
        return attention_mask.index_select(1, slots_of_step(attention_mask, input_ids)) != 0


def _first(at: Tensor, positions: Tensor) -> Tensor:
    """The lowest of the positions that are marked [B, T], plus 1; 0 where none is [B]."""
    rank = (at * (BEYOND - positions)).amax(1)
    return torch.where(rank > 0, BEYOND - rank + 1, 0)
