"""Pictures among the tokens of a prompt."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from llmexport.export.spec import Block, PatchPlaces, PixelShuffle, Port, Rotary, Splice, TileEmbedding


@dataclass(frozen=True)
class Pictures:
    """What a vision graph is given, in the order of the tokens that stand for it, row by row.

    pixels: as the checkpoint's processor makes them, in fp32. grids [images, 3]: of each picture of a packed row how
    many patches it has in time, height and width; None for tiles of one size.
    """

    pixels: np.ndarray
    grids: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.pixels if self.grids is None else self.grids)


@dataclass(frozen=True)
class Sight:
    """How a model sees, as its blocks say it.

    tokens: the ids that stand for pictures, the last one for frames of a video; none in a model without text. pixels:
    where colours go in. Either `merge` x `merge` patches of a packed row make a token, or a tile makes so many of them;
    the other is 0. sections: whether a token has a position in time, height and width.
    """

    tokens: tuple[int, ...]
    pixels: Port
    merge: int
    tile: int
    sections: bool

    def runs(self, pictures: Pictures) -> list[int]:
        """How many tokens each picture takes, or each frame of one, or each tile."""
        if pictures.grids is None:
            return [self.tile] * len(pictures)
        return [h * w // self.merge**2 for t, h, w in pictures.grids.tolist() for _ in range(t)]

    def positions(self, ids: np.ndarray, mask: np.ndarray, pictures: Pictures) -> np.ndarray | None:
        """The positions [3, B, T] of a prompt; None where pictures are counted as text is."""
        if not self.sections or pictures.grids is None:
            return None
        return mrope_positions(ids, self.tokens, pictures.grids, self.merge, mask)


def sight(blocks: Collection[Block]) -> Sight | None:
    """How a model of these blocks sees; None if it does not."""
    ends = [b for b in blocks if isinstance(b, PatchPlaces | TileEmbedding)]
    if not ends:
        return None
    return Sight(
        tokens=next((b.tokens for b in blocks if isinstance(b, Splice)), ()),
        pixels=ends[0].inputs[0],
        merge=next((b.merge for b in blocks if isinstance(b, PatchPlaces)), 0),
        tile=next((b.tokens for b in blocks if isinstance(b, PixelShuffle)), 0),
        sections=any(isinstance(b, Rotary) and b.sections for b in blocks),
    )


def mrope_positions(
    ids: np.ndarray, tokens: Collection[int], grids: np.ndarray, merge: int, mask: np.ndarray | None = None
) -> np.ndarray:
    """The positions [3, B, T] (time, height, width) of a prompt [B, T], as get_rope_index of modeling_qwen3_5.py.

    tokens: the ids that stand for pictures; grids [images, 3] in patches, merge of them a side for one token. A frame
    of a video is a picture of its own. The tokens of a picture count on from the text before it; text goes on behind
    the largest of them. mask [B, T] is 0 for padding, whose positions are 0. Raises ValueError where a run of such
    tokens is not as long as its picture.
    """
    frames = [(int(h) // merge, int(w) // merge) for t, h, w in grids for _ in range(int(t))]
    positions = np.zeros((3, *ids.shape), np.int64)
    seen = 0
    for row, line in enumerate(ids):
        real = np.flatnonzero(np.ones_like(line) if mask is None else mask[row])
        visual = np.isin(line[real], list(tokens))
        at, start = 0, 0
        while at < len(real):
            if not visual[at]:
                positions[:, row, real[at]] = start
                at, start = at + 1, start + 1
                continue
            if seen == len(frames):
                raise ValueError(f"row {row} has tokens for more pictures than the {seen} that are given")
            height, width = frames[seen]
            end = at + height * width
            if not visual[at:end].all() or len(visual[at:end]) < height * width:
                raise ValueError(f"picture {seen + 1} takes {height * width} tokens, row {row} has fewer in its place")
            places = np.stack((np.zeros(height * width, np.int64), *np.divmod(np.arange(height * width), width)))
            positions[:, row, real[at:end]] = start + places
            at, start, seen = end, start + max(height, width), seen + 1
    if seen < len(frames):
        raise ValueError(f"{len(frames)} pictures are given, the prompt has tokens for {seen}")
    return positions
