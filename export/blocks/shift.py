"""Tokens beside those before them, where the last one of a step is a state."""

import torch
from torch import Tensor


def shifted(x: Tensor, present: Tensor, end: Tensor, past: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens [B, T, C], of which padding is zeros; those before them; and the last one up to end [B].

    `present` [B, T] is 1 for a token and 0 for padding; `past` [B, 1, C] is the token before the step.
    """
    token = x * present.unsqueeze(-1)
    both = torch.cat((past, token), 1)
    # Not a slice, which keeps a step of one token apart.
    before = both.index_select(1, torch.arange(x.shape[1], device=x.device))
    return token, before, both.gather(1, end.long().reshape(-1, 1, 1).expand(-1, 1, x.shape[2]))
