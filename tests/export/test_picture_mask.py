"""The tokens of a picture see each other: the numbers of their pictures, and the masks made of these, against
transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from transformers.models.gemma3 import modeling_gemma3

from llmexport.export import blocks
from llmexport.export.spec import Keys, Mask, Splice

IMAGE, TEXT, WIDTH = 250, 7, 4
# Of each row: padding, then text and pictures in turn. The last row ends with a picture and begins with one.
ROWS = ((0, 3, 9, 2, 9, 8), (3, 1, 4, 6, 9, 8), (6, 0, 9, 3, 4, 9))
IDS = np.stack([np.repeat([0, *[TEXT, IMAGE] * 2, TEXT], row) for row in ROWS])
IDS[2, -9:] = IMAGE
PADDING = np.stack([np.arange(31) >= row[0] for row in ROWS]).astype(np.int64)
WINDOWS = [None, 3, 8, 12]
# Where a prompt is cut: nowhere, within text, within a picture of one row or of all, before its last token.
CUTS = [0, 2, 6, 9, 14, 30]


def module(block: Splice | Mask) -> torch.nn.Module:
    return blocks.module(block, torch.float32)


def numbers(ids: np.ndarray, features: int | None = None) -> torch.Tensor:
    """The numbers of pictures that a step of these tokens has."""
    count = int((ids == IMAGE).sum()) if features is None else features
    _, found = module(Splice((IMAGE,), WIDTH, numbered=True))(
        torch.from_numpy(ids), torch.zeros(*ids.shape, WIDTH), torch.ones(count, WIDTH)
    )
    return found


def theirs(window: int | None, past: int) -> torch.Tensor:
    """What transformers sees in a step behind so many cached tokens, as Gemma 3 prefills in chunks."""
    config = transformers.Gemma3TextConfig(sliding_window=window or 4, num_hidden_layers=1)
    config._attn_implementation = "eager"
    step, cache = torch.zeros(*IDS[:, past:].shape, WIDTH), transformers.DynamicCache()
    if past:
        cache.update(*[torch.zeros(len(IDS), 1, past, WIDTH)] * 2, 0)
    groups = modeling_gemma3.get_block_sequence_ids_for_mask(torch.from_numpy((IDS == IMAGE).astype(np.int64)))
    masks = modeling_gemma3.create_masks_for_vision_model(
        config, step, torch.from_numpy(PADDING), cache, None, block_sequence_ids=groups
    )
    return masks["sliding_attention" if window else "full_attention"] == 0


def ours(window: int | None, past: int, pictures: torch.Tensor) -> torch.Tensor:
    step = torch.from_numpy(IDS[:, past:])
    return module(Mask(window, pictures=True))(torch.from_numpy(PADDING), step, pictures)


def real(past: int) -> torch.Tensor:
    return torch.from_numpy(PADDING[:, past:].astype(bool))


@pytest.mark.parametrize("past", CUTS)
@pytest.mark.parametrize("window", WINDOWS)
def test_what_a_token_sees_is_what_it_sees_in_transformers(window: int | None, past: int) -> None:
    """Both ways within a picture, as far as it is of the step, and no further back than the window."""
    expected, found = theirs(window, past), ours(window, past, numbers(IDS[:, past:]))
    assert torch.equal(found[:, 0][real(past)], expected[:, 0][real(past)])
    ahead = found[:, 0].triu(past + 1)
    assert ahead.any() == (past < 30)
    causal = module(Mask(window))(torch.from_numpy(PADDING), torch.from_numpy(IDS[:, past:]))
    assert torch.equal(found & ~ahead.unsqueeze(1), causal)


def test_pictures_with_a_word_between_are_two_and_tokens_side_by_side_are_one() -> None:
    ids = np.array([[IMAGE, IMAGE, TEXT, IMAGE, TEXT, TEXT, IMAGE, IMAGE]])
    [found] = numbers(ids).tolist()
    assert found == [1, 1, 0, 2, 0, 0, 4, 4]


def test_a_step_without_features_has_no_picture() -> None:
    """Whatever tokens a model says itself: transformers is then given no token_type_ids."""
    assert not numbers(IDS, features=0).any()


@pytest.mark.parametrize("past", CUTS)
@pytest.mark.parametrize("window", WINDOWS)
def test_a_static_cache_sees_the_same(window: int | None, past: int) -> None:
    pictures, tokens = numbers(IDS[:, past:]), IDS.shape[1] - past
    expected = ours(window, past, pictures)
    keys = Keys(window, slides=True) if window else Keys(40)
    first, written = torch.from_numpy((PADDING == 0).sum(1)), torch.full((len(IDS),), past)
    found = module(Mask(window, keys=keys, pictures=True))(first, written, torch.from_numpy(IDS[:, past:]), pictures)
    # Of a cache that slides the last slots are the step's, and those before them the last ones that were written.
    found = found[..., -tokens - min(past, window) :] if window else found[..., : past + tokens]
    expected = expected[..., -found.shape[-1] :]
    assert torch.equal(found.transpose(1, 2)[real(past)], expected.transpose(1, 2)[real(past)])
