"""ALiBi against the models of transformers that have it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor as of_bloom
from transformers.models.falcon.modeling_falcon import build_alibi_tensor as of_falcon

from llmexport.export import blocks
from llmexport.export.blocks.bias import slopes
from llmexport.export.spec import Alibi, Keys
from llmexport.validate.compare import compare
from llmexport.validate.tolerance import Tolerance

HEADS = (1, 6, 12, 32, 71, 112, 128)  # of BLOOM and Falcon, and others
SAME = Tolerance(1e-6, 1e-6, scaled=True)  # rounding of powers and products in fp32
HIDDEN = -32768


@pytest.mark.parametrize("heads", HEADS)
def test_slopes_of_any_number_of_heads_are_those_of_bloom(heads: int) -> None:
    theirs = of_bloom(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    assert compare(theirs.numpy(), slopes(heads).numpy()).excess(SAME) <= 1


def padded(tokens: int) -> torch.Tensor:
    mask = torch.ones(2, tokens, dtype=torch.int64)
    mask[1, :9] = 0
    return mask


def shown(bias: torch.Tensor) -> np.ndarray:
    """What a softmax sees of logits [..., S]: how far each is below the last."""
    return (bias - bias[..., -1:]).numpy()


@pytest.mark.parametrize(("rounded", "build"), [(False, of_bloom), (True, of_falcon)], ids=["bloom", "falcon"])
@pytest.mark.parametrize("heads", HEADS)
def test_a_softmax_sees_the_bias_of_transformers(heads: int, rounded: bool, build: Callable[..., torch.Tensor]) -> None:
    """Beyond 256 tokens, where bfloat16 tells no place from the next; of padding a softmax sees nothing."""
    mask = padded(700)
    theirs = build(mask, heads, torch.float32).reshape(2, heads, 1, -1) * 0.25
    visible = (mask != 0).reshape(2, 1, 1, -1)
    alibi = blocks.module(Alibi(heads, 0.25, rounded), torch.float32)
    ours = alibi(mask, torch.zeros(2, 1, dtype=torch.int64), visible)
    assert (ours[~visible.expand_as(ours)] == HIDDEN).all()
    for row, first in ((0, 0), (1, 9)):
        expected, found = (shown(x[row, ..., first:]) for x in (theirs, ours))
        assert compare(expected, found).excess(SAME) <= 1


@pytest.mark.parametrize("rounded", [False, True])
def test_a_static_cache_has_the_same_bias(rounded: bool) -> None:
    mask, ids = padded(300), torch.zeros(2, 4, dtype=torch.int64)
    visible = torch.logical_and((mask != 0).reshape(2, 1, 1, -1), torch.ones(1, 1, 4, 1, dtype=torch.bool))
    grown = blocks.module(Alibi(6, rounded=rounded), torch.float32)(mask, ids, visible)
    block = Alibi(6, rounded=rounded, keys=Keys(320))
    slots = torch.nn.functional.pad(visible, (0, 20))
    where = (torch.tensor([0, 9]), torch.tensor([296, 296]))
    static = blocks.module(block, torch.float32)(*where, ids, slots)
    assert torch.equal(static[..., :300], grown)
    assert (static[..., 300:] == HIDDEN).all()


def test_a_cache_of_the_last_tokens_alone_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="ALiBi reads a whole cache"):
        Alibi(4, keys=Keys(8, slides=True))
