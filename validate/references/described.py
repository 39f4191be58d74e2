"""Models that are written here from a published description, for want of a class of transformers."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class Described:
    """A model that computes in float64, or in the 16 bits that are asked for, and keeps no cache: what it carries is
    the tokens so far, of which each step computes all anew, row by row and without their padding.

    `row` makes logits [T, V] of the ids [T] of a text and of their positions [T]. The logits of padding are zero.
    """

    def __init__(self, row: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
        self.row, self.dtype = row, dtype

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Tensor | None = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
    ) -> Any:
        past = 0 if past_key_values is None else past_key_values.shape[-1]
        if position_ids is None:
            position_ids = torch.arange(past, past + input_ids.shape[1]).expand_as(input_ids)
        carried = torch.stack((input_ids, position_ids))
        if past_key_values is not None:
            carried = torch.cat((past_key_values, carried), -1)
        mask = torch.ones_like(carried[0]) if attention_mask is None else attention_mask
        rows = [self._row(*text, real) for *text, real in zip(*carried, mask.bool(), strict=True)]
        logits = torch.stack(rows)[:, past:][:, -logits_to_keep:]
        return SimpleNamespace(logits=logits, past_key_values=carried)

    def _row(self, ids: Tensor, positions: Tensor, real: Tensor) -> Tensor:
        made = self.row(ids[real], positions[real]).to(self.dtype)
        return made.new_zeros(len(ids), made.shape[-1]).masked_scatter(real[:, None], made)


def computing(dtype: torch.dtype) -> torch.dtype:
    """What a reference for a model in `dtype` computes in."""
    return torch.float64 if dtype == torch.float32 else dtype
