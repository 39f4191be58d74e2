"""Models that are written here from a published description, for want of a class of transformers."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from llmexport.validate.carrying import Carrying


class Described(Carrying):
    """A model that computes in float64, or in the 16 bits that are asked for, and keeps no cache: what it carries is
    the tokens so far, of which each step computes all anew, row by row and without their padding.

    `row` makes logits [T, V] of the ids [T] of a text and of their positions [T]. The logits of padding are zero.
    """

    def __init__(self, row: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
        self.row, self.dtype, self.generation_config = row, dtype, SimpleNamespace()

    def forward(
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
        rows = [self._row(*text) for text in zip(*carried, mask.bool(), strict=True)]
        logits = torch.stack(rows)[:, past:][:, -logits_to_keep:]
        return SimpleNamespace(logits=logits, past_key_values=carried)

    __call__ = forward

    def _row(self, ids: Tensor, positions: Tensor, real: Tensor) -> Tensor:
        made = self.row(ids[real], positions[real]).to(self.dtype)
        return made.new_zeros(len(ids), made.shape[-1]).masked_scatter(real[:, None], made)


def computing(dtype: torch.dtype) -> torch.dtype:
    """What a reference for a model in `dtype` computes in."""
    return torch.float64 if dtype == torch.float32 else dtype


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """arXiv 1910.07467, over the last dimension, with statistics in float64."""
    wide = x.double()
    return (wide * (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()).to(x.dtype) * weight


def turned(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """RoPE (arXiv 2104.09864) of [T, H, D]: dimension i turns with dimension i + D / 2."""
    half = x.shape[-1] // 2
    angles = positions[:, None].double() * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    cos, sin = (f(angles).to(x.dtype)[:, None] for f in (torch.cos, torch.sin))
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def attended(q: Tensor, k: Tensor, v: Tensor, scale: float, cap: float = 0.0, prefix: int = 0) -> Tensor:
    """What each token of a text takes from itself and those before it [T, H * D]; k and v [T, G, D] are shared by
    H / G queries each, and logits bounded by `cap` through tanh. All see the first `prefix` tokens."""
    together = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(together, 1) for x in (k, v))
    logits = torch.einsum("qhd,khd->hqk", q, k).double() * scale
    logits = cap * torch.tanh(logits / cap) if cap else logits
    later = torch.ones(logits.shape[1:], dtype=torch.bool).triu(1)
    later[:, :prefix] = False
    weights = logits.masked_fill(later, -torch.inf).softmax(-1).to(v.dtype)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)
