"""Where the tokens of each row stand among the slots that an attention_mask [B, S] speaks of."""

import torch
from torch import Tensor


def tokens_of(attention_mask: Tensor) -> Tensor:
    """1 for each token and 0 for padding, int64."""
    return attention_mask.bool().to(torch.int64)


def tokens_up_to(attention_mask: Tensor) -> Tensor:
    """How many tokens of a row stand in its slots up to each one [B, S], padding left out."""
    return tokens_of(attention_mask).cumsum(1)


def leading_padding(running: Tensor) -> Tensor:
    """How many slots of each row are padding before its first token [B]."""
    return (running == 0).sum(1)


def last_token(tokens: Tensor) -> Tensor:
    """How many slots there are up to the last token of each row, it among them [B]; 0 where there is none."""
    return (tokens * torch.arange(1, tokens.shape[1] + 1, device=tokens.device)).amax(1)


def between(running: Tensor, padding: Tensor, end: Tensor) -> Tensor:
    """How much padding there is between the tokens of each row [B], below 0 where there are none."""
    return end - padding - running.amax(1)
