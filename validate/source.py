"""The text that an encoder reads, and that a decoder goes on from at each of its steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmexport.export.exported import Export
from llmexport.export.spec import SOURCE, Port


@dataclass(frozen=True)
class Source:
    """ids [B, S], and a mask [B, S] that is 1 for a token and 0 for padding."""

    ids: np.ndarray
    mask: np.ndarray


def of_source(port: Port) -> bool:
    """Whether a port is of the text that an encoder reads, or of what a decoder sees of it."""
    return SOURCE in port.shape


def reads_source(export: Export) -> bool:
    """Whether an encoder reads a text, and a decoder goes on from it."""
    return any(of_source(p) for g in export.graphs if g.carried for p in g.assembly.inputs)


def random_source(text: np.ndarray, batch: int, tokens: int, random: np.random.Generator) -> Source:
    """A text of these words, padded on both sides in all rows but the first."""
    ids, mask = text[random.integers(0, len(text), (batch, tokens))], np.ones((batch, tokens), np.int64)
    for row in range(1, batch):
        few = min(2 * row + 1, (tokens - 1) // 2)
        mask[row, :few], mask[row, tokens - few :] = 0, 0
    return Source(ids, mask)
