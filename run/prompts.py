"""What a decoder is first run on: a prompt, and the pieces that a long one is read in."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from llmexport.export.assembly import parts
from llmexport.export.exported import Export
from llmexport.export.spec import Block, DynamicScaling, Experts, LongScaling, Mask, Rotary
from llmexport.run.settings import start_token
from llmexport.validate.pictures import Pictures, Sight
from llmexport.validate.source import Source, reads_source
from llmexport.validate.stages import Stage

# Of a piece: attention scores all its queries against all keys, also those that a query does not see, and beside the
# memory that takes the rest of a step is small. With fewer rows for each expert its weights are read for too little.
TOKENS, ROWS = 512, 64


def row(ids: Sequence[int]) -> np.ndarray:
    """One prompt as a batch of one."""
    return np.array([ids], np.int64)


def opening(ids: np.ndarray, pictures: Pictures | None = None, seen: Sight | None = None) -> Stage:
    """The stage of a prompt [B, T] without padding, and of its pictures, if a model has so seen any."""
    mask = np.ones_like(ids)
    positions = seen.positions(ids, mask, pictures) if seen and pictures else None
    if positions is None:
        positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    return Stage("prompt", "opening", ids, positions, mask, np.zeros_like(ids), pictures)


def begun(
    export: Export, prompt: np.ndarray, pictures: Pictures | None = None, seen: Sight | None = None
) -> tuple[np.ndarray, Callable[[np.ndarray], Stage]]:
    """The tokens [B, T] that a decoder goes on from, and what makes a stage of all its tokens so far.

    Those are the prompt's, unless an encoder reads the prompt. Raises RunError if nobody says what a decoder then
    begins with.
    """
    if not reads_source(export):
        return prompt, functools.partial(opening, pictures=pictures, seen=seen)
    source = Source(prompt, np.ones_like(prompt))
    start = np.full((len(prompt), 1), start_token(export))
    return start, lambda ids: dataclasses.replace(opening(ids), source=source)


def best_at_once(export: Export) -> int:
    """How many tokens of a prompt ONNX Runtime is best given at once, on a CPU."""
    return max([TOKENS, *(ROWS * b.experts // b.top_k for b in _blocks(export) if isinstance(b, Experts))])


def in_pieces(export: Export, stage: Stage, most: int) -> list[Stage]:
    """A stage as stages of at most so many tokens, each of which goes on from the one before and sees what it would.

    It is left whole if some of its tokens are seen from before them, or may be (pictures, padding, the prefixes of
    ChatGLM-6B), and where RoPE's angles change with the number of tokens.
    """
    tokens, past = stage.ids.shape[1], stage.past
    if tokens <= most or stage.pictures is not None or not stage.mask.all():
        return [stage]
    if any(_reads_ahead(b, past + tokens) for b in _blocks(export)):
        return [stage]
    return [
        dataclasses.replace(
            stage,
            kind="piece" if begin else stage.kind,
            ids=stage.ids[:, begin : begin + most],
            positions=stage.positions[..., begin : begin + most],
            mask=stage.mask[:, : past + min(begin + most, tokens)],
            types=stage.types[:, begin : begin + most],
        )
        for begin in range(0, tokens, most)
    ]


def _reads_ahead(block: Block, tokens: int) -> bool:
    """Whether what a block computes of a token depends on those behind it, of so many in all."""
    match block:
        case Mask():
            return block.prefixed
        case Rotary(scaling=DynamicScaling() | LongScaling() as scaling):
            return tokens > scaling.original_positions
    return False


def _blocks(export: Export) -> list[Block]:
    return [p.block for g in export.graphs for step in g.assembly.steps for p in parts(step)]
