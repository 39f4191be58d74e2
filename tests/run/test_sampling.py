"""The choice of a token, against transformers' own logits processors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as theirs

from llmexport.run.sampling import Sampler, Sampling, penalised, softmax, warped

IDS = np.array([[3, 3, 7], [0, 1, 2]])
SHAPES = [
    Sampling(temperature=0.7),
    Sampling(temperature=1.0, top_k=1),
    Sampling(temperature=1.3, top_k=17),
    Sampling(temperature=1.0, top_k=10_000),
    Sampling(temperature=1.0, top_p=0.9),
    Sampling(temperature=1.0, top_p=0.001),
    Sampling(temperature=1.0, min_p=0.1),
    Sampling(repetition_penalty=1.3, temperature=0.6, top_k=50, top_p=0.95, min_p=0.02),
    Sampling(repetition_penalty=0.5, temperature=2.0, top_p=0.5),
]


def scores(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (2, 301)).astype(np.float32)


def by_transformers(given: np.ndarray, sampling: Sampling) -> np.ndarray:
    processors = [theirs.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)]
    processors += [theirs.TemperatureLogitsWarper(sampling.temperature)]
    processors += [theirs.TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    processors += [theirs.TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    processors += [theirs.MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    made = torch.from_numpy(given.copy())
    for processor in processors:
        made = processor(torch.from_numpy(IDS), made)
    return made.numpy()


@pytest.mark.parametrize("sampling", SHAPES, ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_scores_are_shaped_as_transformers_shapes_them(sampling: Sampling, seed: int) -> None:
    found = warped(penalised(scores(seed), IDS, sampling.repetition_penalty), sampling)
    assert np.array_equal(found, by_transformers(scores(seed), sampling))


def test_equal_scores_are_all_kept_by_top_k_as_by_transformers() -> None:
    flat = np.zeros((2, 9), np.float32)
    sampling = Sampling(temperature=1.0, top_k=2)
    assert np.array_equal(warped(flat, sampling), by_transformers(flat, sampling))


def test_temperature_0_takes_the_highest_score() -> None:
    assert np.array_equal(Sampler(Sampling(), 0)(scores(0), IDS), scores(0).argmax(-1))


def test_a_temperature_that_fp32_does_not_hold_takes_the_highest_score() -> None:
    for temperature in (1e-300, 1e-38, 1e-6):
        with np.errstate(all="raise"):
            assert np.array_equal(Sampler(Sampling(temperature=temperature), 0)(scores(0), IDS), scores(0).argmax(-1))


def test_the_same_seed_draws_the_same_tokens_and_another_does_not() -> None:
    def drawn(seed: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0), seed)
        return [int(t) for i in range(10) for t in sampler(scores(i), IDS)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    """2,000 draws: no share is further from its probability than five of its deviations."""
    sampling, draws = Sampling(temperature=1.0, top_k=5), 2000
    rows = np.repeat(scores(0)[:1], draws, 0)
    drawn = Sampler(sampling, 0)(rows, np.zeros((draws, 1), np.int64))
    likely = softmax(warped(scores(0)[:1], sampling))[0]
    shares = np.bincount(drawn, minlength=len(likely)) / draws
    assert (np.abs(shares - likely) <= 5 * np.sqrt(likely * (1 - likely) / draws)).all()
    assert np.count_nonzero(likely) == 5
