"""What a model is run on: prompts that are padded and longer than its windows, and steps past its thresholds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llmexport.export.exported import Export
from llmexport.export.spec import (
    BATCH,
    MOST,
    PAST,
    SEQUENCE,
    SOURCE,
    WRITTEN,
    Assembly,
    CrossMask,
    Graph,
    Port,
    Rotary,
    with_sums,
)
from llmexport.export.static import slots_of
from llmexport.validate.compare import Mismatch
from llmexport.validate.feeds import along_step, limits, sees, shape_of, words
from llmexport.validate.pictures import Pictures, Sight, drawn, sight, smallest
from llmexport.validate.source import Source, of_source, random_source
from llmexport.validate.thresholds import BEFORE, CROSSING, threshold

SHORTEST, LONGEST = 67, 512  # tokens of a prompt made here; longer windows are crossed after a random past
SHIFT, DECODE_STEPS = 100, 8
PIECE = 3  # tokens of a prompt's later piece
# Text before the first picture of a row, and behind each but the last one.
LEAD, GAP = 5, 3
AFTER = 67  # tokens behind the last picture, where there is room: more than a chunk of any delta rule


@dataclass(frozen=True)
class Stage:
    """Tokens that a model is run on at once.

    An "opening" begins anew, with nothing before it; a "decode" step of one token a row and a "piece" of several go on
    from the stage before; a "crossing" begins after a random past. ids and positions are [B, T]; mask [B, past + T] is
    1 for a token and 0 for padding; types [B, T] is the segment of each token. positions may be [3, B, T], for mRoPE;
    pictures are those that its tokens stand for; source is what an encoder read, which all stages up to the next one
    that begins go on from.
    """

    name: str
    kind: Literal["opening", "decode", "piece", "crossing"]
    ids: np.ndarray
    positions: np.ndarray
    mask: np.ndarray
    types: np.ndarray
    pictures: Pictures | None = None
    source: Source | None = None

    @property
    def past(self) -> int:
        """The number of tokens before it."""
        return int(self.mask.shape[1] - self.ids.shape[1])

    @property
    def begins(self) -> bool:
        """Whether it reads nothing of the stage before."""
        return self.kind in ("opening", "crossing")

    @property
    def greedy(self) -> bool:
        """Whether the best next token of its last one follows it."""
        return self.kind in ("opening", "decode")

    @property
    def real(self) -> np.ndarray:
        """Which of its tokens are no padding [B, T]."""
        return self.mask[:, self.past :].astype(bool)

    @property
    def sizes(self) -> dict[str, int]:
        batch, tokens = self.ids.shape
        own = {SOURCE: self.source.ids.shape[1]} if self.source else {}
        return with_sums({BATCH: batch, SEQUENCE: tokens, PAST: self.past, WRITTEN: self.mask.shape[1], **own})

    def at(self, port: Port) -> np.ndarray:
        """Its tokens, and what is known of them, as fed to a port along them. Raises Mismatch on any other port."""
        source = self.source if of_source(port) else None
        match port.use:
            case "tokens":
                value = source.ids if source else self.ids
            case "padding" if source:
                value = source.mask
            case "token_types":
                value = self.types
            case "positions":
                value = self.positions
            case "pixels" if self.pictures is not None:
                return self.pictures.pixels
            case "grid" if self.pictures is not None and self.pictures.grids is not None:
                return self.pictures.grids
            case "padding":
                # Of this stage's tokens alone, or of those before them too.
                value = self.mask[:, -shape_of(port, self.sizes)[-1] :]
            case _:
                raise Mismatch(f"{port.name} is of use {port.use!r}, which no tokens say and no earlier graph makes")
        # Several positions a token, as mRoPE has them, are equal for text.
        return np.ascontiguousarray(np.broadcast_to(value, shape_of(port, self.sizes)))

    def then(self, name: str, kind: Literal["decode", "piece"], ids: np.ndarray) -> Stage:
        """The stage of the tokens [B, n] after these."""
        last = self.positions[..., -1:]
        # Of a picture's last token the largest one counts.
        positions = (last.max(0) if last.ndim == 3 else last) + 1 + np.arange(ids.shape[1])
        mask = np.concatenate((self.mask, np.ones_like(ids)), 1)
        return Stage(name, kind, ids, positions, mask, np.zeros_like(ids), source=self.source)


Script = tuple[Stage, ...]


def runs_at(stage: Stage, graph: Graph) -> bool:
    """Whether a graph has anything to do at a stage."""
    if sees(graph):
        return stage.pictures is not None
    return stage.begins or bool(graph.carried) or any(map(along_step, graph.assembly.inputs))


def opening(
    ids: np.ndarray, mask: np.ndarray, types: np.ndarray | None = None, name: str = "prompt", places: int = MOST
) -> Stage:
    """The stage of a prompt [B, T], whose mask is 1 for a token and 0 for padding.

    Positions count tokens only; those of the first row begin at 0, of others far from it, as far as the model has so
    many `places`, and steps after the prompt some.
    """
    room = max(places - ids.shape[1] - DECODE_STEPS - PIECE, 0)
    shift = np.minimum(SHIFT * np.arange(len(ids)), room)[:, None]
    positions = np.maximum(mask.cumsum(-1) - 1, 0) + shift
    return Stage(name, "opening", ids, positions, mask, np.zeros_like(ids) if types is None else types)


def prompt(model: Assembly | Export, *, batch: int = 2, tokens: int | None = None, seed: int = 0) -> Stage:
    """A random prompt of odd length, past every threshold of at most LONGEST tokens but RoPE's, which counts positions.

    All rows but the first are padded on the left, each by a different number of tokens. A model that sees has pictures
    in every row, and text between and behind them. Raises Mismatch if the model has fewer positions than `tokens`, or a
    static cache without room for them and the steps after them; and if pictures leave no room for text.
    """
    random, below, seen = np.random.default_rng(seed), limits(model.blocks), sight(model.blocks)
    pictures, runs = drawn(seen, batch, np.random.default_rng(seed)) if seen else (None, [])
    if seen and pictures and not seen.tokens:
        if tokens:
            raise Mismatch(f"--tokens {tokens}: this export sees pictures and reads no tokens: leave it out")
        return _alone("pictures", seen, pictures)
    taken = max((_padding(i) + LEAD + sum(n + GAP for _, n in row) - GAP for i, row in enumerate(runs)), default=0)
    tokens, text = _length(model, tokens, taken), words(model.blocks)
    ids = text[random.integers(0, len(text), (batch, tokens), np.int64)]
    mask = np.ones((batch, tokens), np.int64)
    for row in range(1, batch):
        mask[row, : min(_padding(row), tokens - 1)] = 0
    for row, own in enumerate(runs):
        at = _padding(row) + LEAD
        for token, count in own:
            ids[row, at : at + count] = token
            at += count + GAP
    types = random.integers(0, below["token_types"], ids.shape, np.int64)
    stage = opening(ids, mask, types, places=below["positions"])
    stage = with_source(stage, model, random)
    return with_pictures(stage, seen, pictures) if seen and pictures else stage


def _length(model: Assembly | Export, tokens: int | None, taken: int) -> int:
    """How many tokens a prompt has, of which so many are taken by pictures and what is before them."""
    lengths = [threshold(b) + 9 for b in model.blocks if not isinstance(b, Rotary)]
    long_enough = max([n for n in lengths if n <= LONGEST] + [SHORTEST, taken + AFTER if taken else 0]) | 1
    most = min((b.most[SEQUENCE] for b in model.blocks if SEQUENCE in b.most), default=tokens or long_enough)
    if slots := slots_of(model.blocks):
        room = slots - DECODE_STEPS - PIECE
        if taken >= room:
            raise Mismatch(
                f"a static cache of {slots} has room for a prompt of {room} tokens, its pictures and the text between "
                f"them take {taken}: export with --max-tokens {taken + 1 + DECODE_STEPS + PIECE} or more"
            )
        if tokens and tokens > room:
            raise Mismatch(f"--tokens {tokens}: a static cache of {slots} has room for a prompt of {room}: name fewer")
        most = min(most, room)
    if tokens and tokens > most:
        raise Mismatch(f"--tokens {tokens}: this model has positions for {most}: name as many or fewer")
    if tokens and tokens <= taken:
        raise Mismatch(
            f"--tokens {tokens}: the pictures of the prompt and the text between them take {taken}: "
            f"name {taken + 1} or more"
        )
    return tokens or min(long_enough, most)


def with_pictures(stage: Stage, seen: Sight, pictures: Pictures) -> Stage:
    """The opening with pictures that some of its tokens stand for. Raises ValueError if those are not as many."""
    own = seen.positions(stage.ids, stage.mask, pictures)
    return dataclasses.replace(stage, pictures=pictures, positions=stage.positions if own is None else own)


def with_source(stage: Stage, model: Assembly | Export, random: np.random.Generator) -> Stage:
    """The stage with a random text of two tokens more for the encoder of a model that has one."""
    if not any(isinstance(b, CrossMask) for b in model.blocks):
        return stage
    batch, tokens = stage.ids.shape
    return dataclasses.replace(stage, source=random_source(words(model.blocks), batch, tokens + 2, random))


def one_picture(seen: Sight, pictures: Pictures) -> Stage:
    """A stage of the smallest picture alone, for a model that reads no tokens."""
    return _alone("one picture", seen, smallest(seen, pictures))


def _alone(name: str, seen: Sight, pictures: Pictures) -> Stage:
    ids = np.zeros((1, sum(seen.runs(pictures))), np.int64)
    return dataclasses.replace(opening(ids, np.ones_like(ids), name=name), pictures=pictures)


def _padding(row: int) -> int:
    """How many tokens a row is padded by."""
    return 2 * row + 1 if row else 0


def padded_right(stage: Stage) -> Stage:
    """The same prompt with the padding of each row behind its tokens, as encoders are mostly given it."""
    ids, mask, types = (np.flip(rows, 1) for rows in (stage.ids, stage.mask, stage.types))
    return opening(ids, mask, types, f"{stage.name}, padded right")


def unpadded(model: Assembly | Export, prompt: Stage) -> Stage:
    """A prompt of text as long as that one, in which no row is padded."""
    text, random, places = words(model.blocks), np.random.default_rng(0), limits(model.blocks)["positions"]
    ids = text[random.integers(0, len(text), prompt.ids.shape)]
    return with_source(opening(ids, np.ones_like(ids), name="unpadded", places=places), model, random)


def crossing(model: Assembly | Export, at: int, seed: int = 0) -> Stage:
    """A stage of one row that crosses a threshold."""
    text = words(model.blocks)
    ids = text[np.random.default_rng(seed).integers(0, len(text), (1, CROSSING))]
    # No step goes beyond a static cache, or a table of positions.
    past = max(min(at - BEFORE, limits(model.blocks)["positions"] - CROSSING), 0)
    ids = ids[:, : min(slots_of(model.blocks) or MOST, limits(model.blocks)["positions"]) - past]
    mask = np.ones((1, past + ids.shape[1]), np.int64)
    stage = Stage(f"across {at}", "crossing", ids, past + np.arange(ids.shape[1])[None], mask, np.zeros_like(ids))
    return with_source(stage, model, np.random.default_rng(seed))
