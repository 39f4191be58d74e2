"""What a difference in the logits means to who reads tokens: how far the next-token distribution moved, and when
greedy tokens part. Not a bound: the tolerances judge."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

FEW = 5  # of the best tokens, beside the best one
ROWS = 64  # tokens at a time, as their scores are widened to float64


@dataclass(frozen=True)
class Metrics:
    """Over all real tokens of a script, `tokens` in number.

    kl_mean, kl_max: of KL(reference || found) of the next-token distribution, in nats. top1: the share of tokens whose
    best next token is the reference's. top5: the share of the five best that are among its five best. Tied scores
    agree. parted: the first stage whose last token is followed by another one in some row, "" if there is none; None if
    tokens follow no stage, as of an encoder.
    """

    tokens: int
    kl_mean: float
    kl_max: float
    top1: float
    top5: float
    parted: str | None

    @property
    def text(self) -> str:
        kl = f"KL {self.kl_mean:.1e}, at most {self.kl_max:.1e}"
        shares = f"{kl}; top-1 {self.top1:.1%}, top-5 {self.top5:.1%}"
        if self.parted is None:
            return shares
        return f"{shares}; greedy tokens " + (f"part at {self.parted}" if self.parted else "the same")


@dataclass(frozen=True)
class Scores:
    """The logits [B, T, V] of one stage, of a reference and as found; `real` [B, T] says which tokens are no padding.

    greedy: whether the last token of each row is followed by the best one.
    """

    stage: str
    reference: np.ndarray
    found: np.ndarray
    real: np.ndarray
    greedy: bool


def measure(stages: Iterable[Scores]) -> Metrics | None:
    """The metrics of a script; None if no stage has a real token."""
    kl: list[np.ndarray] = []
    best: list[np.ndarray] = []
    few: list[np.ndarray] = []
    parted: str | None = None
    for stage in stages:
        reference, found = stage.reference[stage.real], stage.found[stage.real]
        for start in range(0, len(reference), ROWS):
            rows = slice(start, start + ROWS)
            wide, other = (x[rows].astype(np.float64) for x in (reference, found))
            kl.append(divergence(wide, other))
            best.append(agreement(wide, other, 1))
            few.append(agreement(wide, other, FEW))
        if stage.greedy and not parted:
            last = stage.real[:, -1]
            wide, other = (x[last, -1].astype(np.float64) for x in (stage.reference, stage.found))
            same = agreement(wide, other, 1)
            parted = "" if (same == 1).all() else stage.stage
    if not kl:
        return None
    kls = np.concatenate(kl)
    top1, top5 = (float(np.concatenate(x).mean()) for x in (best, few))
    return Metrics(len(kls), float(kls.mean()), float(kls.max()), top1, top5, parted)


def divergence(reference: np.ndarray, found: np.ndarray) -> np.ndarray:
    """KL(reference || found) of the distributions of rows of logits [N, V], in nats [N]; NaN where a row has one."""
    p, q = _log_softmax(reference), _log_softmax(found)
    with np.errstate(invalid="ignore"):
        # What the reference gives no chance adds nothing.
        terms = np.where(np.isneginf(p), 0.0, np.exp(p) * (p - q))
    return terms.sum(-1)


def agreement(reference: np.ndarray, found: np.ndarray, k: int) -> np.ndarray:
    """The share of the `k` best of each row [N, V] as found that are among the reference's `k` best, or tied [N]."""
    k = min(k, reference.shape[-1])
    least = np.partition(reference, -k, -1)[:, -k, None]
    chosen = np.argpartition(found, -k, -1)[:, -k:]
    share = (np.take_along_axis(reference, chosen, -1) >= least).mean(-1)
    # A row with a NaN chooses nothing.
    return np.where(np.isnan(found).any(-1) | np.isnan(reference).any(-1), 0.0, share)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        shifted = wide - wide.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
