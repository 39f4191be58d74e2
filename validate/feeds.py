"""Inputs to run a model on: seeded, longer than its windows, padded on the left."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes  # noqa: F401  teaches np.dtype "bfloat16"
import numpy as np

from llmexport.export.assembly import Assembly
from llmexport.export.spec import BATCH, PAST, SEQUENCE, TOTAL, Attention, Block, DecoderLayer, Embedding, Mask, Port
from llmexport.validate.runners import Feed

SHORTEST, LONGEST = 67, 512  # tokens of a prompt made here; the mask alone is run past longer windows
SHIFT = 100


@dataclass(frozen=True)
class Prompt:
    """Token ids [B, T] and the mask of real tokens [B, T]; some rows begin with padding."""

    ids: np.ndarray
    mask: np.ndarray

    @property
    def positions(self) -> np.ndarray:
        """Positions that count real tokens only; those of the first row begin at 0, of others far from it."""
        shift = SHIFT * np.arange(len(self.ids))[:, None]
        return np.maximum(self.mask.cumsum(-1) - 1, 0) + shift


def prompt(assembly: Assembly, *, batch: int = 2, tokens: int | None = None, seed: int = 0) -> Prompt:
    """A random prompt of odd length, past every window of the model if that is at most LONGEST tokens.

    All rows but the first are padded on the left, each by a different number of tokens.
    """
    random = np.random.default_rng(seed)
    vocabulary = next(s.block.vocabulary for s in assembly.steps if isinstance(s.block, Embedding))
    tokens = tokens or min(max([w + 9 for w in windows(assembly)] + [SHORTEST]), LONGEST) | 1
    ids = random.integers(0, vocabulary, (batch, tokens), np.int64)
    mask = np.ones((batch, tokens), np.int64)
    for row in range(1, batch):
        mask[row, : min(2 * row + 1, tokens - 1)] = 0
    return Prompt(ids, mask)


def windows(assembly: Assembly) -> list[int]:
    """The windows and chunks of a model's attention, in tokens."""
    found = [reach(s.block) for s in assembly.steps]
    found += [s.block.mixer.window for s in assembly.steps if isinstance(s.block, DecoderLayer) and _slides(s.block)]
    return list(dict.fromkeys(w for w in found if w))


def reach(block: Block) -> int:
    """How far a mask lets a token look back: its window or chunk, 0 if it has none."""
    return (block.window or block.chunk or 0) if isinstance(block, Mask) else 0


def _slides(layer: DecoderLayer) -> bool:
    return isinstance(layer.mixer, Attention) and layer.mixer.window > 0


def prefill(assembly: Assembly, start: Prompt, dtype: str) -> Feed:
    """The feed of the first step: the whole prompt, an empty past."""
    given = {"input_ids": start.ids, "position_ids": start.positions, "attention_mask": start.mask}
    sizes = {BATCH: len(start.ids), SEQUENCE: start.ids.shape[1], TOTAL: start.ids.shape[1], PAST: 0}
    feed = {}
    for port in assembly.inputs:
        # Several positions a token, as mRoPE has them, are equal for text.
        value = given.get(port.name, np.zeros((), _dtype(port, dtype)))
        feed[port.name] = np.ascontiguousarray(np.broadcast_to(value, _shape(port, sizes)))
    return feed


def advance(feed: Feed, outputs: Feed, chosen: np.ndarray) -> Feed:
    """The feed of the next step: the tokens `chosen` [B, n], with the caches that the last step returned."""
    mask = np.concatenate((feed["attention_mask"], np.ones_like(chosen)), 1)
    following = {"input_ids": chosen, "attention_mask": mask}
    if "position_ids" in feed:
        following["position_ids"] = feed["position_ids"][..., -1:] + 1 + np.arange(chosen.shape[1])
    return following | {n: outputs[n.replace("past_key_values", "present")] for n in feed if n not in following}


def block_sizes(block: Block) -> list[dict[str, int]]:
    """Sizes to run one block at: a prompt, and a few tokens after a past that is longer than its window."""
    past = max(21, max(reach(block), getattr(block, "window", 0) or 0) + 9)
    return [{BATCH: 2, SEQUENCE: 13, PAST: 0}, {BATCH: 3, SEQUENCE: 1, PAST: 21}, {BATCH: 2, SEQUENCE: 3, PAST: past}]


def block_feed(block: Block, dtype: str, sizes: dict[str, int], seed: int = 0) -> Feed:
    """A random feed for one block alone, by its ports: what each port means decides what is drawn."""
    random = np.random.default_rng(seed)
    sizes = sizes | {TOTAL: sizes[PAST] + sizes[SEQUENCE]}
    angles = random.uniform(0, 100, (sizes[BATCH], sizes[SEQUENCE], 1))
    feed = {}
    for port in block.inputs:
        shape = _shape(port, sizes)
        value: np.ndarray
        match port.name:
            case "input_ids":
                value = random.integers(0, getattr(block, "vocabulary", 100), shape)
            case "position_ids":
                value = np.broadcast_to(np.arange(sizes[PAST], sizes[TOTAL]), shape)
            case "attention_mask":
                # Padding on the left, and of another length in each row.
                value = np.arange(shape[1]) >= 2 * np.arange(shape[0])[:, None]
            case "mask":
                value = np.broadcast_to(np.tri(shape[2], shape[3], k=sizes[PAST]), shape)
            case "start":
                value = np.arange(shape[0])
            case "length":
                value = np.full(shape, sizes[TOTAL])
            case "present_tokens":
                value = np.arange(shape[1]) >= np.arange(shape[0])[:, None]
            case "temperature":
                value = random.uniform(1, 1.5, shape)
            case "weights":
                value = random.uniform(0.1, 1, shape)
            case "experts":
                value = _distinct(random, getattr(block, "experts", shape[-1]), shape)
            case "past_recurrent_state":
                value = 0.1 * random.standard_normal(shape)
            case "cos":
                value = np.cos(angles / np.arange(1, shape[-1] + 1))
            case "sin":
                value = np.sin(angles / np.arange(1, shape[-1] + 1))
            case _:
                value = random.standard_normal(shape)
        feed[port.name] = np.ascontiguousarray(value.astype(_dtype(port, dtype)))
    return feed


def _distinct(random: np.random.Generator, experts: int, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers below `experts`, no two of a row alike."""
    return random.permuted(np.broadcast_to(np.arange(experts), (*shape[:-1], experts)), axis=-1)[..., : shape[-1]]


def _shape(port: Port, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(sizes[d] if isinstance(d, str) else d for d in port.shape)


def _dtype(port: Port, dtype: str) -> np.dtype:
    return np.dtype(dtype if port.dtype == "T" else port.dtype)
