"""Prompts for branches of a graph that a padded one with several pictures does not take."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np

from llmexport.export.exported import Export
from llmexport.validate.feeds import limits, words
from llmexport.validate.pictures import Pictures, Sight, sight
from llmexport.validate.stages import Stage, opening, with_pictures, with_source

# Passes after which a graph does otherwise where no row is padded, and where a picture is seen alone.
BY_PADDING = {"lower_static_attention", "lower_sink_attention"}
BY_PICTURES = {"lower_whole_attention"}


def branching(export: Export, prompt: Stage) -> Iterator[Stage]:
    """The prompts that take those of its branches that this one does not."""
    if _has(export, BY_PADDING):
        yield unpadded(export, prompt)
    seen, pictures = sight(export.blocks), prompt.pictures
    if seen and pictures and pictures.grids is not None and _has(export, BY_PICTURES):
        yield one_seen(seen, prompt, pictures, pictures.grids[-1:])


def _has(export: Export, passes: Collection[str]) -> bool:
    return any(g.fusions[p].count for g in export.graphs for p in passes & g.fusions.keys())


def unpadded(export: Export, prompt: Stage) -> Stage:
    """A prompt of text as long as that one, in which no row is padded."""
    text, random, places = words(export.blocks), np.random.default_rng(0), limits(export.blocks)["positions"]
    ids = text[random.integers(0, len(text), prompt.ids.shape)]
    return with_source(opening(ids, np.ones_like(ids), name="unpadded", places=places), export, random)


def one_seen(seen: Sight, prompt: Stage, pictures: Pictures, grid: np.ndarray) -> Stage:
    """The last row of a prompt alone, without its padding, and the last of these pictures, which is all that it has."""
    real = prompt.real[-1]
    ids, types = (rows[-1:, real] for rows in (prompt.ids, prompt.types))
    own = Pictures(pictures.pixels[-int(grid.prod()) :], grid)
    return with_pictures(opening(ids, np.ones_like(ids), types, "one picture"), seen, own)
