"""Beyond how many tokens a model computes what it did not before, and the sizes that show what a block computes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llmexport.export.exported import Export
from llmexport.export.spec import (
    BATCH,
    FEATURES,
    IMAGES,
    PAST,
    SEQUENCE,
    SOURCE,
    SPLICED,
    TILES,
    WRITTEN,
    Assembly,
    Attention,
    Block,
    DynamicScaling,
    Layer,
    LongScaling,
    Mask,
    RelativeBias,
    Rotary,
    Temperature,
)
from llmexport.validate.feeds import along_step
from llmexport.validate.source import of_source

# Tokens of a step that crosses a threshold, and how many of them come before it.
CROSSING, BEFORE = 13, 2
SUSPICIOUS = re.compile("window$|window_size|chunk|floor_scale|original_max_position")


def thresholds(model: Assembly | Export) -> set[int]:
    """The thresholds of a model's blocks."""
    return {t for b in model.blocks if (t := threshold(b))}


def suspected_thresholds(config: Any) -> set[int]:
    """Integers in config.json whose key looks like a window or length.

    They are crossed too, as a window that our reader forgot shows only beyond it.
    """
    if isinstance(config, Mapping):
        own = {v for k, v in config.items() if type(v) is int and v > 0 and SUSPICIOUS.search(k)}
        return own.union(*map(suspected_thresholds, config.values()))
    return set()


def threshold(block: Block) -> int:
    """The number of tokens after which a block computes what it did not before: its window, its chunk, its
    temperature's interval, the distance of its last bucket, the positions of LongRoPE's short factors and of dynamic
    RoPE's own base; 0 if it has none."""
    match block:
        case Mask():
            return block.window or block.chunk or 0
        case RelativeBias():
            return block.distance
        case Temperature():
            return block.interval
        case Rotary(scaling=DynamicScaling() | LongScaling() as scaling):
            return scaling.original_positions
        case Attention():
            return block.window
        case Layer():
            return max(threshold(s.block) for s in block.sublayers)
    return 0


def block_sizes(block: Block) -> list[dict[str, int]]:
    """Sizes to run one block at: a prompt, a token after a past, and tokens that cross its threshold; or of one that
    sees, three pictures and the smallest one."""
    if any(map(of_source, block.outputs)):
        return [_within(block, 2, 1, 0) | {SOURCE: n} for n in (13, 1, threshold(block) + 7)]
    if not any(map(along_step, (*block.inputs, *block.outputs))):
        few, one = ({IMAGES: n, TILES: n, FEATURES: f} for n, f in ((3, 11), (1, 1)))
        return [_within(block, 2, 13, 0) | few, _within(block, 2, 13, 0) | one]
    past = max(21, threshold(block) - BEFORE)
    return [_within(block, *sizes) | {SPLICED: 11} for sizes in ((2, 13, 0), (3, 1, 21), (2, CROSSING, past))]


def _within(block: Block, batch: int, sequence: int, past: int) -> dict[str, int]:
    """Such sizes, with no more of a past than the block takes."""
    past = min(past, block.most.get(PAST, past), block.most.get(WRITTEN, past + sequence) - sequence)
    return {BATCH: batch, SEQUENCE: sequence, PAST: past, WRITTEN: past + sequence}
