"""A tied weight that a checkpoint stores a second time."""

from __future__ import annotations

import numpy as np

from llmexport.export.checkpoint import Checkpoint
from llmexport.export.errors import ExportError

PIECE = 2**24  # bytes compared at a time


def check_tied(copy: str, original: str, checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint stores a tied weight a second time, as `copy`.

    Raises ExportError if the two differ: the model would not be the one that config.json describes.
    """
    if not checkpoint.names >= {copy, original}:
        return False
    # One in few bits has other numbers.
    names = (copy, original)
    plain = checkpoint.matrices.keys().isdisjoint(names) and not any(checkpoint.tensors[n].coded for n in names)
    if not plain or not _alike(checkpoint, original, copy) or not _same_bits(checkpoint, original, copy):
        raise ExportError(
            f"config.json says tie_word_embeddings, but the checkpoint's {copy} is not its {original}: "
            "one of the two is wrong; set tie_word_embeddings to false if the head is its own"
        )
    return True


def _alike(checkpoint: Checkpoint, *names: str) -> bool:
    first, second = (checkpoint.tensors[n] for n in names)
    return (first.dtype, first.shape) == (second.dtype, second.shape)


def _same_bits(checkpoint: Checkpoint, *names: str) -> bool:
    """Compared piece by piece: a table of 256,000 words is a gigabyte."""
    first, second = (checkpoint.read(n).reshape(-1).view(np.uint8) for n in names)
    pieces = range(0, first.size, PIECE)
    return all(np.array_equal(first[i : i + PIECE], second[i : i + PIECE]) for i in pieces)
