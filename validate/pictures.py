"""Pictures among the tokens of a prompt."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from llmexport.export.spec import (
    FEATURES,
    IMAGES,
    SPLICED,
    TILES,
    Block,
    Mask,
    PatchPlaces,
    PixelShuffle,
    PooledProjector,
    Port,
    Rotary,
    Splice,
    TileEmbedding,
)


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

    def pieces(self, patches: int, frames: int) -> Iterator[Pictures]:
        """The same in several, each of at most so many patches and frames, or tiles, but that no frame is cut.

        A frame or a tile sees itself alone, so that what they give, one after the other, is what all give at once; the
        memory of a packed row grows with its square.
        """
        if self.grids is None:
            held, grids = np.ones(len(self.pixels), np.int64), None
        else:
            grids = frames_of(self.grids)
            held = grids.prod(1)
        start, at = 0, 0
        for end in range(1, len(held) + 1):
            size = int(held[start:end].sum())
            if end < len(held) and size + held[end] <= patches and end - start < frames:
                continue
            yield Pictures(self.pixels[at : at + size], None if grids is None else grids[start:end])
            start, at = end, at + size


def frames_of(grids: np.ndarray) -> np.ndarray:
    """The grids of images, and of each frame of a video alone [frames, 3]."""
    return np.repeat(grids * (0, 1, 1) + (1, 0, 0), grids[:, 0], 0)


@dataclass(frozen=True)
class Sight:
    """How a model sees, as its blocks say it.

    tokens: the ids that stand for pictures, the last one for frames of a video; none in a model without text. pixels:
    where colours go in. Either `merge` x `merge` patches of a packed row make a token, or a tile makes so many of them;
    the other is 0. places: how many hidden states a tile has; 0 too. sections: whether a token has a position in time,
    height and width. mutual: whether the tokens of a picture see each other.
    """

    tokens: tuple[int, ...]
    pixels: Port
    merge: int
    tile: int
    places: int
    sections: bool
    mutual: bool

    def runs(self, pictures: Pictures) -> list[int]:
        """How many tokens each picture takes, or each frame of one, or each tile."""
        if pictures.grids is None:
            return [self.tile] * len(pictures)
        return [h * w // self.merge**2 for _, h, w in frames_of(pictures.grids).tolist()]

    def sizes(self, pictures: Pictures | None) -> dict[str, int]:
        """The sizes of axes where a model sees these; of those of its tower none, where it sees nothing."""
        if pictures is None:
            return {SPLICED: 0}
        made = sum(self.runs(pictures))
        return {TILES if pictures.grids is None else IMAGES: len(pictures), FEATURES: made, SPLICED: made}

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
        tile=next((b.tokens for b in blocks if isinstance(b, PixelShuffle | PooledProjector)), 0),
        places=next((b.places for b in blocks if isinstance(b, TileEmbedding)), 0),
        sections=any(isinstance(b, Rotary) and b.sections for b in blocks),
        mutual=any(isinstance(b, Mask) and b.pictures for b in blocks),
    )


def stands_for(seen: Sight, ids: np.ndarray, pictures: Pictures) -> list[int]:
    """The id of the tokens that stand for each picture of a prompt [B, T]."""
    visual = ids[np.isin(ids, seen.tokens)]
    assert pictures.grids is not None
    ends = (pictures.grids.prod(1) // seen.merge**2).cumsum()
    return [int(n) for n in visual[np.concatenate(([0], ends[:-1]))]]


Runs = list[list[tuple[int, int]]]  # of each row: an id, and how many tokens of it


def drawn(seen: Sight, rows: int, random: np.random.Generator) -> tuple[Pictures, Runs]:
    """Random pictures for a prompt of so many rows, and the tokens that stand for them.

    The first row has an image and a video of two frames, of another size, or a tile and two more; each other row has
    an image of its own.
    """
    image, video = (seen.tokens[0], seen.tokens[-1]) if seen.tokens else (0, 0)
    shape = [int(n) for n in seen.pixels.shape[1:]]
    if not seen.merge:
        runs = [[(image, seen.tile), (image, 2 * seen.tile)], *([[(image, seen.tile)]] * (rows - 1))]
        return Pictures(random.standard_normal((rows + 2, *shape), np.float32)), runs
    sizes = [(1, 4, 3), (2, 2, 3), *((1, 3, 1 + row) for row in range(1, rows))]
    grids = np.array(sizes) * (1, seen.merge, seen.merge)
    pixels = random.standard_normal((int(grids.prod(1).sum()), *shape), np.float32)
    first = [(image, 12), (video, 6), (video, 6)]
    return Pictures(pixels, grids), [first, *([(image, 3 + 3 * row)] for row in range(1, rows))]


def smallest(seen: Sight, pictures: Pictures) -> Pictures:
    """A picture of one token, or of one tile, of the colours of these."""
    if not seen.merge:
        return Pictures(pictures.pixels[:1])
    return Pictures(pictures.pixels[: seen.merge**2], np.array([(1, seen.merge, seen.merge)]))


def patch_places(grids: np.ndarray, merge: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each patch of a packed row: its row and column [2, N], how many of them its picture has [2, N], and the number
    of its frame [N]. `merge` x `merge` neighbours follow each other."""
    frames = [(h, w) for _, h, w in frames_of(grids).tolist()]
    order = [np.arange(h * w).reshape(h // merge, merge, w // merge, merge).swapaxes(1, 2).ravel() for h, w in frames]
    places = [np.stack(np.divmod(o, w)) for o, (_, w) in zip(order, frames, strict=True)]
    held = [h * w for h, w in frames]
    return np.concatenate(places, 1), np.repeat(frames, held, 0).T, np.repeat(np.arange(len(frames)), held)


def mrope_positions(
    ids: np.ndarray, tokens: Collection[int], grids: np.ndarray, merge: int, mask: np.ndarray | None = None
) -> np.ndarray:
    """The positions [3, B, T] (time, height, width) of a prompt [B, T], as get_rope_index of modeling_qwen3_5.py.

    tokens: the ids that stand for pictures; grids [images, 3] in patches, merge of them a side for one token. A frame
    of a video is a picture of its own. The tokens of a picture count on from the text before it; text goes on behind
    the largest of them. mask [B, T] is 0 for padding, whose positions are 0. Raises ValueError where a run of such
    tokens is not as long as its picture.
    """
    frames = [(h // merge, w // merge) for _, h, w in frames_of(grids).tolist()]
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
