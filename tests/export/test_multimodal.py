"""Multimodal exports against transformers, which loads the same folder: pictures in a prompt, and the answer to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from arch_cases import TOWERS, Case
from decoders import MAX_ABS, RECURRENT, RMS_RATIO, prompt
from towers import PACKED, RUNNERS, Feed, Joined, pixels, reference

from llmexport.export import manifest
from llmexport.validate.compare import compare
from llmexport.validate.pictures import mrope_positions
from llmexport.validate.tolerance import tolerance

pytestmark = pytest.mark.model

DECODE = 8
# Of each row in turn: a number of words, or a picture by its height and width in features, or its tiles.
PICTURES: dict[bool, list[list[Any]]] = {
    True: [[5, (4, 3), 7, (2, 2), 70], [4, (1, 5), 66]],
    False: [[5, (1,), 7, (2,), 70], [4, (1,), 66]],
}


def shown(case: Case, folder: Path) -> tuple[np.ndarray, np.ndarray, Feed, np.ndarray]:
    """ids and mask [2, T], padded on the left; the pictures; and positions, as transformers counts them."""
    model, random = reference(folder), np.random.default_rng(1)
    rows = PICTURES[case in PACKED]
    pieces = [p for row in rows for p in row if isinstance(p, tuple)]
    token, merge = model.config.image_token_id, 2
    grids = np.array([[1, merge * h, merge * w] for h, w in pieces]) if case in PACKED else None
    feed = pixels(folder, sum(n for (n,) in pieces) if grids is None else grids)
    made = []
    for row in rows:
        counts = [p if isinstance(p, int) else int(np.prod(p)) * (1 if case in PACKED else 9) for p in row]
        parts = [
            random.integers(0, 240, n) if isinstance(p, int) else [token] * n for p, n in zip(row, counts, strict=True)
        ]
        made.append(np.concatenate(parts))
    length = max(map(len, made))
    ids = np.stack([np.pad(line, (length - len(line), 0), constant_values=3) for line in made])
    mask = np.stack([np.arange(length) >= length - len(line) for line in made]).astype(np.int64)
    if grids is None:
        return ids, mask, feed, np.maximum(mask.cumsum(-1) - 1, 0)
    kinds = torch.from_numpy((ids == token).astype(np.int32))
    given = (torch.from_numpy(ids), kinds, torch.from_numpy(grids))
    positions, _ = model.model.get_rope_index(*given, attention_mask=torch.from_numpy(mask))
    assert np.array_equal(mrope_positions(ids, (token,), grids, merge, mask), positions.numpy())
    return ids, mask, feed, positions.numpy()


def theirs(model: Any, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray, cache: Any, feed: Feed) -> Any:
    known = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    known |= {{"grid_thw": "image_grid_thw"}.get(n, n): a for n, a in feed.items()}
    if feed and model.config.model_type == "gemma3":
        known["token_type_ids"] = (ids == model.config.image_token_id).astype(np.int64)
    with torch.no_grad():
        return model(**{n: torch.from_numpy(a) for n, a in known.items()}, past_key_values=cache, use_cache=True)


def check(folder: Path, expected: np.ndarray, found: np.ndarray, where: np.ndarray | None = None) -> None:
    allowed = tolerance("float32", manifest.read(folder))
    assert (allowed.max_abs, allowed.rms_ratio) in ((MAX_ABS, RMS_RATIO), RECURRENT)
    difference = compare(expected, found, where)
    assert difference.excess(allowed) <= 1, str(difference)
    assert difference.scale > 0.5, "logits near zero would prove nothing"


def along(positions: np.ndarray, case: Case) -> np.ndarray:
    """The positions [B, T] of words, as the graph reads them."""
    return np.broadcast_to(positions, (3, *positions.shape)) if case in PACKED else positions


@pytest.mark.parametrize("case", TOWERS, ids=str)
def test_an_answer_to_pictures_matches_transformers(case: Case, tiny_checkpoint, exported) -> None:
    """Two pictures of different sizes in a row, one in the other, more than 64 words behind the last one."""
    folder, export = tiny_checkpoint(case, "all"), exported(case, part="all")
    model, ours = reference(folder), [Joined(export, runner) for runner in RUNNERS]
    ids, mask, feed, positions = shown(case, folder)
    cache, where = None, mask.astype(bool)
    for _ in range(DECODE + 1):
        made = theirs(model, ids, mask, positions, cache, feed)
        cache, expected = made.past_key_values, made.logits.numpy()
        for side in ours:
            check(export, expected, side.step(ids, positions, mask, feed), where)
        last = positions[..., -1:]
        ids, feed, where = expected[:, -1:].argmax(-1), {}, np.ones((2, 1), bool)
        positions = along((last.max(0) if case in PACKED else last) + 1, case).copy()
        mask = np.concatenate((mask, np.ones_like(ids)), 1)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("case", TOWERS, ids=str)
def test_a_text_without_pictures_may_say_their_tokens(case: Case, runner: str, tiny_checkpoint, exported) -> None:
    folder, export = tiny_checkpoint(case, "all"), exported(case, part="all")
    ids, mask = prompt()
    ids[:, 7::9] = reference(folder).config.image_token_id
    positions = along(np.maximum(mask.cumsum(-1) - 1, 0), case).copy()
    expected = theirs(reference(folder), ids, mask, positions, None, {}).logits.numpy()
    check(export, expected, Joined(export, runner).step(ids, positions, mask), mask.astype(bool))
