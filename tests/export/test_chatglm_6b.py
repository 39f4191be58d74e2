"""ChatGLM-6B on prompts as its tokenizer makes them: a context, a blank, and the token that begins what follows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from arch_cases import SLOTS
from decoders import RUNNERS, Decoder, prompt, reference, theirs
from published_configs import PUBLISHED

from llmexport.export import archs, blocks
from llmexport.export.onnx_file import read_model
from llmexport.export.spec import Layer, Passage

ARCH = "chatglm_6b"
BEGINS, GMASK, MASK = (archs.load(ARCH).tiny[f"{n}_token_id"] for n in ("bos", "gmask", "mask"))
FAR = 200


def asked(length: int, padding: int = 5, behind: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A row that ends in a gMASK and `behind` tokens, one of them bos; one padded on the left, with a MASK amid it."""
    ids, mask = prompt(length, padding=padding)
    ids[0, -behind - 1 : -behind + 1] = GMASK, BEGINS
    ids[1, [-7, -2]] = MASK, BEGINS
    return ids, mask, np.maximum(mask.cumsum(-1) - 1, 0)


@pytest.mark.model
@pytest.mark.parametrize("shift", [0, FAR])
@pytest.mark.parametrize("length", [13, 63, 64, 65, 130])
def test_what_follows_a_context_matches_the_description(length: int, shift: int, tiny_checkpoint, exported) -> None:
    model = reference(tiny_checkpoint(ARCH))
    ours = [Decoder(exported(ARCH), runner) for runner in RUNNERS]
    ids, mask, positions = asked(length, length // 2 - 4)
    positions, cache = positions + shift, None
    for step in range(9):
        made = theirs(model, ids, mask, positions, cache)
        cache, expected = made.past_key_values, made.logits.numpy()
        for decoder in ours:
            decoder.check(expected, decoder.step(ids, positions, mask), mask.astype(bool) if step == 0 else None)
        ids, positions = expected[:, -1:].argmax(-1), positions[:, -1:] + 1
        mask = np.concatenate((mask, np.ones_like(ids)), 1)


@pytest.mark.model
@pytest.mark.parametrize("cut", [-1, -2])
def test_a_prompt_that_is_cut_behind_its_context_equals_the_whole(cut: int, exported) -> None:
    ids, mask, positions = asked(64)
    whole = Decoder(exported(ARCH), "onnxruntime").step(ids[:1], positions[:1], mask[:1])
    pieces = Decoder(exported(ARCH), "onnxruntime")
    first = pieces.step(ids[:1, :cut], positions[:1, :cut], mask[:1, :cut])
    second = pieces.step(ids[:1, cut:], positions[:1, cut:], mask[:1])
    pieces.check(whole, np.concatenate((first, second), 1))


@pytest.mark.model
def test_a_static_cache_shows_the_context_too(exported) -> None:
    ids, mask, positions = asked(64)
    expected = Decoder(exported(ARCH), "onnxruntime").step(ids, positions, mask)
    static = Decoder(exported(ARCH, slots=SLOTS), "onnxruntime")
    static.check(expected, static.step(ids, positions, mask), mask.astype(bool))


@pytest.mark.model
def test_the_context_sees_all_of_itself_and_nothing_that_follows(exported) -> None:
    ids, mask, positions = asked(40, padding=0)
    other = ids.copy()
    other[0, 34] += 1  # the last word of the context
    other[1, -1] += 1  # a word behind it
    before, after = (Decoder(exported(ARCH), "onnxruntime").step(i, positions, mask) for i in (ids, other))
    assert np.abs(before[0, 0] - after[0, 0]).max() > 1e-3
    assert np.array_equal(before[1, :-1], after[1, :-1])


def places(ids: list[int], past: list[int] | None = None) -> tuple[list[int], list[int], list[bool], list[int]]:
    """What the block makes of one row without padding, of which `past` says what was found before."""
    start = max(past or [0])
    mask, tokens = torch.ones(1, start + len(ids), dtype=torch.int64), torch.tensor([ids])
    block = blocks.module(Passage(BEGINS, (GMASK, MASK)), torch.float32)
    positions = torch.arange(start, start + len(ids))[None]
    (first, second), shown, found = block(mask, tokens, positions, torch.tensor([past or [0, 0, 0]]))
    return first[0].tolist(), second[0].tolist(), shown[0].tolist(), found[0].tolist()


@pytest.mark.parametrize(
    ("ids", "first", "second", "context", "found"),
    [
        # As THUDM's get_position_ids and get_masks make them.
        ([5, 6, GMASK, BEGINS, 7, 8], [0, 1, 2, 2, 2, 2], [0, 0, 0, 1, 2, 3], 3, [4, 3, 0]),
        ([5, MASK, 6, BEGINS, 7], [0, 1, 2, 1, 1], [0, 0, 0, 1, 2], 3, [4, 0, 2]),
        ([MASK, GMASK, 6, BEGINS, BEGINS], [0, 1, 2, 1, 1], [0, 0, 0, 1, 2], 3, [4, 2, 1]),
        ([5, 6, 7], [0, 1, 2], [0, 0, 0], 0, [0, 0, 0]),
    ],
)
def test_tokens_stand_where_the_published_code_puts_them(ids, first, second, context, found) -> None:
    assert places(ids) == (first, second, [i < context for i in range(len(ids))], found)


def test_a_later_step_stands_at_the_blank_and_counts_on() -> None:
    assert places([9, GMASK], [4, 3, 0]) == ([2, 2], [2, 3], [False, False], [4, 3, 0])


def test_the_published_config_names_its_words_and_is_told_from_those_of_the_same_type() -> None:
    named = archs.choose(None, PUBLISHED["chatglm-6b"])
    model = read_model(named, PUBLISHED["chatglm-6b"])
    assert named.name == ARCH
    assert [s.block for s in model.steps if isinstance(s.block, Passage)] == [Passage(130004, (130001, 130000))]
    [layer] = {s.block for s in model.steps if isinstance(s.block, Layer)}
    assert {(s.kept, s.from_normed) for s in layer.sublayers} == {(56**0.5, True)}
    assert archs.choose(None, PUBLISHED["chatglm3-6b"]).name == "chatglm"
