"""How the next token is chosen from the scores: as the logits processors of transformers do, without torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Below it, scores over the temperature may leave fp32, and a draw is the likeliest token anyway.
LEAST_TEMPERATURE = 1e-5


@dataclass(frozen=True)
class Sampling:
    """What shapes the choice, in the order in which it is applied; `temperature` 0 takes the highest score.

    repetition_penalty: divides the score of a token that occurred, or multiplies it where it is below 0. top_k 0: all.
    top_p: the fewest tokens whose probability is at least this. min_p: tokens at least so likely as the likeliest
    times this.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


class Sampler:
    """Chooses at random, the same with the same seed."""

    def __init__(self, sampling: Sampling, seed: int) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(seed)

    def __call__(self, scores: np.ndarray, ids: np.ndarray) -> np.ndarray:
        scores = penalised(scores, ids, self._sampling.repetition_penalty)
        if self._sampling.temperature < LEAST_TEMPERATURE:
            return scores.argmax(-1)
        sums = softmax(warped(scores, self._sampling)).cumsum(-1)
        drawn = self._random.random(len(scores))[:, None] * sums[:, -1:]
        # The first token whose sum is above what was drawn: never one of probability 0.
        return (sums > drawn).argmax(-1)


def penalised(scores: np.ndarray, ids: np.ndarray, penalty: float) -> np.ndarray:
    """Scores [B, V] after RepetitionPenaltyLogitsProcessor; ids [B, T] are the tokens so far."""
    if penalty == 1.0:
        return scores
    old = np.take_along_axis(scores, ids, -1)
    new = scores.copy()
    np.put_along_axis(new, ids, np.where(old < 0, old * np.float32(penalty), old / np.float32(penalty)), -1)
    return new


def warped(scores: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Scores [B, V] after the temperature, and -inf where top_k, top_p or min_p leaves a token out."""
    scores = scores / np.float32(sampling.temperature)
    if sampling.top_k:
        least = np.partition(scores, -min(sampling.top_k, scores.shape[-1]), -1)
        least = least[:, -min(sampling.top_k, scores.shape[-1]), None]
        scores = np.where(scores < least, -np.inf, scores)
    if sampling.top_p < 1:
        order = np.argsort(scores, -1, kind="stable")
        sums = softmax(np.take_along_axis(scores, order, -1)).cumsum(-1)
        left_out = sums <= 1 - sampling.top_p
        left_out[:, -1] = False
        scores = scores.copy()
        np.put_along_axis(scores, order, np.where(left_out, -np.inf, np.take_along_axis(scores, order, -1)), -1)
    if sampling.min_p:
        likely = softmax(scores)
        scores = np.where(likely < sampling.min_p * likely.max(-1, keepdims=True), -np.inf, scores)
    return scores


def softmax(scores: np.ndarray) -> np.ndarray:
    """Probabilities [B, V], in fp64."""
    powers = np.exp(scores.astype(np.float64) - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)
