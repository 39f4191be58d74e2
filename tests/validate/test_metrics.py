"""Metrics of next-token distributions, against closed forms and torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from llmexport.validate import metrics
from llmexport.validate.compare import compare
from llmexport.validate.metrics import Metrics, Scores, agreement, divergence, measure
from llmexport.validate.tolerance import TOLERANCE


def logits(*shape: int, seed: int = 0, scale: float = 3.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def scores(reference: np.ndarray, found: np.ndarray, stage: str = "prompt", real=None, greedy: bool = True) -> Scores:
    return Scores(stage, reference, found, np.ones(reference.shape[:2], bool) if real is None else real, greedy)


def test_divergence_of_two_choices_is_the_closed_form() -> None:
    p, q = np.array([0.2, 0.5, 0.9]), np.array([0.4, 0.5, 0.3])
    rows = [np.stack([np.log(x), np.log(1 - x)], -1) + 7 for x in (p, q)]
    expected = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    found = divergence(*rows)
    assert np.abs(found - expected).max() <= 1e-15
    assert found[1] == 0


@pytest.mark.parametrize("vocabulary", [1, 2, 63, 1000])
def test_divergence_is_torchs(vocabulary: int) -> None:
    a, b = logits(17, vocabulary), logits(17, vocabulary, seed=1)
    p, q = (torch.from_numpy(x.astype(np.float64)).log_softmax(-1) for x in (a, b))
    expected = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).numpy()
    assert compare(expected, divergence(a, b)).max_abs <= 1e-12


def test_a_word_that_has_no_chance_adds_nothing_unless_it_is_the_reference_that_gives_it_one() -> None:
    a, b = np.array([[0.0, 0.0, -np.inf]]), np.array([[0.0, 0.0, 0.0]])
    assert divergence(a, b)[0] == pytest.approx(math.log(1.5), abs=1e-15)
    assert divergence(b, a)[0] == np.inf
    assert divergence(a, a)[0] == 0


def test_agreement_counts_the_best_as_a_set() -> None:
    a = np.arange(10.0)[None]
    swapped, half = a.copy(), a.copy()
    swapped[0, [9, 8]] = swapped[0, [8, 9]]
    half[0, [0, 1]] = 99
    assert [agreement(a, x, 1)[0] for x in (a, swapped, half)] == [1, 0, 0]
    assert [agreement(a, x, 5)[0] for x in (a, swapped, half)] == [1, 1, 0.6]
    assert agreement(a[:, :3], a[:, :3], 5)[0] == 1


def test_tied_scores_agree() -> None:
    a, b = np.array([[1.0, 5.0, 5.0, 0.0]]), np.array([[1.0, 4.9, 5.0, 0.0]])
    assert agreement(a, b, 1)[0] == 1
    # Which of the two the reference would choose is chance; that the other is worse is not.
    assert agreement(b, np.array([[1.0, 5.0, 4.9, 0.0]]), 1)[0] == 0


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 130])
def test_a_script_is_measured_as_its_tokens_one_by_one(tokens: int) -> None:
    a = logits(2, tokens, 40)
    b = a + logits(2, tokens, 40, seed=2, scale=0.3)
    found = measure([scores(a, b)])
    rows = [(x.reshape(-1, 40)) for x in (a, b)]
    kl = [float(divergence(p[None], q[None])[0]) for p, q in zip(*rows, strict=True)]
    assert found is not None
    assert found.tokens == 2 * tokens
    assert (found.kl_mean, found.kl_max) == (pytest.approx(np.mean(kl), rel=1e-12), max(kl))
    assert found.top1 == np.mean([p.argmax() == q.argmax() for p, q in zip(*rows, strict=True)])


def test_padding_is_not_measured() -> None:
    a = logits(2, 5, 8)
    b, real = a.copy(), np.ones((2, 5), bool)
    real[1, :2] = False
    b[1, :2] = 100 * logits(2, 8, seed=3)
    assert measure([scores(a, b, real=real)]) == Metrics(8, 0, 0, 1, 1, "")
    assert measure([scores(a, b, real=np.zeros((2, 5), bool))]) is None


def test_the_first_stage_whose_greedy_tokens_part_is_named() -> None:
    a = logits(2, 1, 8)
    other = a.copy()
    other[1, 0, a[1, 0].argmin()] = 50
    same, earlier = scores(a, a), scores(other, a, "across 32", greedy=False)
    steps = [scores(a, a, "decode 1"), scores(a, other, "decode 2"), scores(a, other, "decode 3")]
    found = measure([same, earlier, *steps])
    assert found is not None
    assert found.parted == "decode 2"
    assert "greedy tokens part at decode 2" in found.text


def test_a_row_behind_padding_on_the_right_chooses_nothing() -> None:
    a, real = logits(2, 3, 8), np.ones((2, 3), bool)
    real[1, 2] = False
    b = a.copy()
    b[1, 2] = -a[1, 2]
    found = measure([scores(a, b, real=real)])
    assert found == Metrics(5, 0, 0, 1, 1, "")


def test_a_nan_agrees_with_nothing() -> None:
    a = logits(1, 2, 8)
    b = a.copy()
    b[0, 1, 3] = np.nan
    found = measure([scores(a, b)])
    assert found is not None
    assert (found.top1, found.top5, found.parted) == (0.5, 0.5, "prompt")
    assert math.isnan(found.kl_max)
    assert math.isnan(found.kl_mean)


def test_roundoff_within_tolerance_moves_the_distribution_by_its_square() -> None:
    """What the tolerances allow of logits is next to nothing of the distribution."""
    a = logits(1, 9, 100)
    found = measure([scores(a, a + np.float32(TOLERANCE["float32"].max_abs) * logits(1, 9, 100, seed=4, scale=1))])
    assert found is not None
    assert 0 < found.kl_max < TOLERANCE["float32"].max_abs ** 2 * 10
    assert metrics.ROWS > 9
