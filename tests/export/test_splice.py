"""Where pictures enter a text: the block alone, against masked_scatter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from towers import PACKED, RUNNERS, run_only

pytestmark = pytest.mark.model

CASE = PACKED[0]
IMAGE, VIDEO, TEXT, WIDTH = 250, 251, 7, 64
ROWS = {
    "no pictures": [[TEXT] * 5],
    "pictures alone": [[IMAGE] * 5],
    "two rows": [[TEXT, IMAGE, IMAGE, TEXT], [IMAGE, TEXT, TEXT, IMAGE]],
    "images and videos": [[VIDEO, TEXT, IMAGE, VIDEO, TEXT, IMAGE], [TEXT, TEXT, VIDEO, VIDEO, IMAGE, TEXT]],
    "one token": [[IMAGE]],
}


def spliced(exported, ids: np.ndarray, features: int, runner: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    hidden = random.standard_normal((*ids.shape, WIDTH), np.float32)
    seen = random.standard_normal((features, WIDTH), np.float32)
    feed = {"input_ids": ids, "hidden": hidden, "image_features": seen}
    return hidden, seen, run_only(exported(CASE, block="splice", part="all"), runner, feed)["spliced"]


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("name", ROWS)
def test_tokens_of_pictures_take_features_in_their_order(name: str, runner: str, exported) -> None:
    ids = np.array(ROWS[name])
    visual = np.isin(ids, (IMAGE, VIDEO))
    hidden, seen, found = spliced(exported, ids, int(visual.sum()), runner)
    expected = torch.from_numpy(hidden).masked_scatter(torch.from_numpy(visual)[..., None], torch.from_numpy(seen))
    assert np.array_equal(found, expected.numpy())


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_step_without_features_leaves_every_token_its_own_embedding(runner: str, exported) -> None:
    """A model may say such a token itself, which is then no picture's (transformers, without pixel_values)."""
    hidden, _, found = spliced(exported, np.array([[TEXT, IMAGE, VIDEO], [IMAGE, TEXT, TEXT]]), 0, runner)
    assert np.array_equal(found, hidden)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("given", [1, 4])
def test_more_tokens_than_features_fail(given: int, runner: str, exported) -> None:
    with pytest.raises(Exception, match=r"out of|idx"):
        spliced(exported, np.array([[IMAGE, TEXT, IMAGE], [IMAGE, IMAGE, IMAGE]]), given, runner)
