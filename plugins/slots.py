"""The slots of a static cache, written as ai.onnx TensorScatter-24 writes them."""

import torch
from torch import Tensor


def written(past: Tensor, update: Tensor, write_indices: Tensor) -> Tensor:
    """past [B, H, S, D] with update [B, H, T, D] written from slot write_indices [B] on, of any integer type.

    Raises ValueError where a row would be written beyond S, as ONNX Runtime fails; TensorRT does not tell.
    """
    tokens = torch.arange(update.shape[2], device=update.device)
    places = write_indices.reshape(-1, 1, 1, 1) + tokens.reshape(-1, 1)
    if (places < 0).any() or (places >= past.shape[2]).any():
        raise ValueError(f"a static cache of {past.shape[2]} slots has no slot {int(places.max())}")
    return past.scatter(2, places.expand_as(update), update)
