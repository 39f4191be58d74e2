"""Inputs to run a model on: seeded, longer than its windows, padded on the left; and past all its thresholds."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import ml_dtypes  # noqa: F401  teaches np.dtype "bfloat16"
import numpy as np

from llmexport.export.spec import (
    BATCH,
    PAST,
    SEQUENCE,
    Assembly,
    Attention,
    Block,
    Embedding,
    Layer,
    LongScaling,
    Mask,
    Port,
    Rotary,
    Temperature,
    with_sums,
)
from llmexport.validate.runners import Feed

SHORTEST, LONGEST = 67, 512  # tokens of a prompt made here; longer windows are crossed after a random past
SHIFT = 100
# Tokens of a step that crosses a threshold, and how many of them come before it.
CROSSING, BEFORE = 13, 2
SOUNDS = re.compile("window$|window_size|chunk|floor_scale|original_max_position")


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
    """A random prompt of odd length, past every threshold of at most LONGEST tokens but RoPE's, which counts positions.

    All rows but the first are padded on the left, each by a different number of tokens.
    """
    random = np.random.default_rng(seed)
    vocabulary = next(s.block.vocabulary for s in assembly.steps if isinstance(s.block, Embedding))
    lengths = [threshold(s.block) + 9 for s in assembly.steps if not isinstance(s.block, Rotary)]
    tokens = tokens or max([n for n in lengths if n <= LONGEST] + [SHORTEST]) | 1
    ids = random.integers(0, vocabulary, (batch, tokens), np.int64)
    mask = np.ones((batch, tokens), np.int64)
    for row in range(1, batch):
        mask[row, : min(2 * row + 1, tokens - 1)] = 0
    return Prompt(ids, mask)


def thresholds(assembly: Assembly) -> set[int]:
    """The thresholds of a model's blocks."""
    return {t for s in assembly.steps if (t := threshold(s.block))}


def said(config: Any) -> set[int]:
    """The numbers of a config that sound like a threshold, whether or not the specs took them for one: a reading that
    leaves a window out is found past that window alone."""
    if isinstance(config, dict):
        own = {v for k, v in config.items() if type(v) is int and v > 0 and SOUNDS.search(k)}
        return own.union(*map(said, config.values()))
    return set()


def threshold(block: Block) -> int:
    """After how many tokens a block computes what it did not before: its window, its chunk, its temperature's
    interval, the positions of LongRoPE's short factors; 0 if it has none."""
    match block:
        case Mask():
            return block.window or block.chunk or 0
        case Temperature():
            return block.interval
        case Rotary(scaling=LongScaling()):
            return block.scaling.original_positions
        case Attention():
            return block.window
        case Layer():
            return max(threshold(s.block) for s in block.sublayers)
    return 0


def prefill(assembly: Assembly, start: Prompt, dtype: str) -> Feed:
    """The feed of the first step: the whole prompt, an empty past."""
    given = {"input_ids": start.ids, "position_ids": start.positions, "attention_mask": start.mask}
    sizes = with_sums({BATCH: len(start.ids), SEQUENCE: start.ids.shape[1], PAST: 0})
    feed = {}
    for port in assembly.inputs:
        # Several positions a token, as mRoPE has them, are equal for text.
        value = given.get(port.name, np.zeros((), _dtype(port, dtype)))
        feed[port.name] = np.ascontiguousarray(np.broadcast_to(value, _shape(port, sizes)))
    return feed


def crossing(assembly: Assembly, at: int, dtype: str, seed: int = 0) -> Feed:
    """A step of one row that crosses a threshold, after a random past; recurrent states are zero."""
    random = np.random.default_rng(seed)
    sizes = with_sums({BATCH: 1, SEQUENCE: CROSSING, PAST: max(at - BEFORE, 0)})
    vocabulary = next(s.block.vocabulary for s in assembly.steps if isinstance(s.block, Embedding))
    given = {
        "input_ids": random.integers(0, vocabulary, CROSSING),
        "position_ids": sizes[PAST] + np.arange(CROSSING),
        "attention_mask": np.ones(()),
    }
    feed = {}
    for port in assembly.inputs:
        value: np.ndarray = given.get(port.name, np.zeros(()))
        shape = _shape(port, sizes)
        if PAST in port.shape:
            value = random.standard_normal(shape, np.float32)
        feed[port.name] = np.ascontiguousarray(np.broadcast_to(value.astype(_dtype(port, dtype)), shape))
    return feed


def past_bytes(assembly: Assembly, tokens: int) -> int:
    """What the caches of one row take after that many tokens, in fp32."""
    sizes = {BATCH: 1, PAST: tokens}
    return sum(4 * math.prod(_shape(p, sizes)) for p in assembly.inputs if PAST in p.shape)


def advance(feed: Feed, outputs: Feed, chosen: np.ndarray) -> Feed:
    """The feed of the next step: the tokens `chosen` [B, n], with the caches that the last step returned, if any."""
    mask = np.concatenate((feed["attention_mask"], np.ones_like(chosen)), 1)
    following = {"input_ids": chosen, "attention_mask": mask}
    if "position_ids" in feed:
        following["position_ids"] = feed["position_ids"][..., -1:] + 1 + np.arange(chosen.shape[1])
    grown = {n: n.replace("past_key_values", "present") for n in feed if n not in following}
    return following | {n: outputs[present] for n, present in grown.items() if present in outputs}


def block_sizes(block: Block) -> list[dict[str, int]]:
    """Sizes to run one block at: a prompt, a token after a past, and tokens that cross its threshold."""
    past = max(21, threshold(block) - BEFORE)
    return [
        {BATCH: 2, SEQUENCE: 13, PAST: 0},
        {BATCH: 3, SEQUENCE: 1, PAST: 21},
        {BATCH: 2, SEQUENCE: CROSSING, PAST: past},
    ]


def block_feed(block: Block, dtype: str, sizes: dict[str, int], seed: int = 0) -> Feed:
    """A random feed for one block alone, by its ports: what each port means decides what is drawn."""
    random = np.random.default_rng(seed)
    sizes, total = with_sums(sizes), sizes[PAST] + sizes[SEQUENCE]
    angles = random.uniform(0, 100, (sizes[BATCH], sizes[SEQUENCE], 1))
    feed = {}
    for port in block.inputs:
        shape = _shape(port, sizes)
        value: np.ndarray
        match port.name:
            case "input_ids":
                value = random.integers(0, getattr(block, "vocabulary", 100), shape)
            case "position_ids":
                value = np.broadcast_to(np.arange(sizes[PAST], total), shape)
            case "attention_mask":
                # Padding on the left, of another length in each row, and after the first row.
                value = np.arange(shape[1]) >= 2 * np.arange(shape[0])[:, None]
                value[0, -1] = False
            case "mask":
                value = np.broadcast_to(np.tri(shape[2], shape[3], k=sizes[PAST]), shape)
            case "start":
                value = np.arange(shape[0])
            case "length":
                value = np.full(shape, total)
            case "present_tokens":
                value = np.arange(shape[1]) >= np.arange(shape[0])[:, None]
            case "tokens_end":
                value = sizes[SEQUENCE] - np.arange(shape[0]) % (sizes[SEQUENCE] + 1)
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
