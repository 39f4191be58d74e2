"""Decoders against transformers, which loads the same folder: what the project is for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from arch_cases import DECODERS, IN_BF16, IN_FP16, Case, others_slow, reads
from arch_cases import FIRST as FIRST_OF_ALL
from decoders import PROMPT, REFUSED, RUNNERS, Decoder, prompt, reference, theirs

from llmexport.export import manifest
from llmexport.validate.compare import compare
from llmexport.validate.tolerance import TOLERANCE, tolerance

DECODE = 8
FIRST = [c for c in FIRST_OF_ALL if c in DECODERS]
FAR = 200  # where positions begin that do not begin at 0


@pytest.mark.every_family
@pytest.mark.parametrize("case", DECODERS, ids=str)
@pytest.mark.parametrize("shift", [0, FAR])
def test_logits_match_transformers_through_prefill_and_decode(
    case: Case, shift: int, tiny_checkpoint, exported
) -> None:
    """Batch 2, left padding, carried caches; positions that begin at 0, and far from it."""
    model = reference(tiny_checkpoint(case))
    ours = [Decoder(exported(case), runner) for runner in RUNNERS]
    ids, mask = prompt()
    positions = np.maximum(mask.cumsum(-1) - 1, 0) + shift
    cache = None
    for step in range(DECODE + 1):
        made = theirs(model, ids, mask, positions, cache)
        cache = made.past_key_values
        expected = made.logits.numpy()
        for decoder in ours:
            decoder.check(expected, decoder.step(ids, positions, mask), mask.astype(bool) if step == 0 else None)
        ids, positions = expected[:, -1:].argmax(-1), positions[:, -1:] + 1
        mask = np.concatenate((mask, np.ones_like(ids)), 1)


LONG = [c for c in FIRST if c.arch in ("glm4", "gpt_oss", "llama4", "qwen3_5_moe")]
LENGTHS = [(c, n) for c in FIRST for n in (1, 63, 130, *((64, 65, 1025) if c in LONG else ()))]


@pytest.mark.parametrize(("case", "length"), LENGTHS, ids=str)
def test_prompts_of_other_lengths_match_transformers(case: Case, length: int, tiny_checkpoint, exported) -> None:
    """Half of a row is padding, from 63 tokens on more than a chunk of the delta rule; positions begin far from 0."""
    ids, mask = prompt(length, padding=length // 2 + 5 if length > 10 else 0)
    positions = np.maximum(mask.cumsum(-1) - 1, 0) + FAR
    made = theirs(reference(tiny_checkpoint(case)), ids, mask, positions, None)
    ours = Decoder(exported(case), "onnxruntime")
    ours.check(made.logits.numpy(), ours.step(ids, positions, mask), mask.astype(bool))


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_a_prompt_in_two_pieces_equals_the_whole(case: Case, exported) -> None:
    """Past every window and chunk; cut within the padding of a row, which is longer than a chunk of the delta rule,
    and after it."""
    ids, mask = prompt(197, padding=70)
    positions = np.maximum(mask.cumsum(-1) - 1, 0) + FAR
    whole = Decoder(exported(case), "onnxruntime").step(ids, positions, mask)
    for cut in (1, 64, 100) if case in LONG else (100,):
        pieces = Decoder(exported(case), "onnxruntime")
        first = pieces.step(ids[:, :cut], positions[:, :cut], mask[:, :cut])
        second = pieces.step(ids[:, cut:], positions[:, cut:], mask)
        pieces.check(whole, np.concatenate((first, second), 1), mask.astype(bool))


PIECES = (PROMPT, 1, 5, 1, 1)  # tokens of each step
RIGHT = {0: slice(PROMPT + 3, PROMPT + 7), 1: slice(PROMPT - 11, PROMPT)}  # within a step, a step, after the prompt
HOLE = {1: slice(9, 16)}
LEFT_ONLY = [c for c in FIRST if reads(c, "span_start")]
SHIFTED = [c for c in FIRST if reads(c, "presence_end")]  # tokens see the one before them in their step, be it padding
ANYWHERE = [c for c in FIRST if c not in LEFT_ONLY]


def in_pieces(decoder: Decoder, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The logits of a batch that is run step by step, its positions counting tokens."""
    positions, made, begin = np.maximum(mask.cumsum(-1) - 1, 0), [], 0
    for end in np.cumsum(PIECES):
        made.append(decoder.step(ids[:, begin:end], positions[:, begin:end], mask[:, :end]))
        begin = end
    return np.concatenate(made, 1)


def padded(hidden: dict[int, slice]) -> tuple[np.ndarray, np.ndarray]:
    ids, mask = prompt(sum(PIECES), padding=0, seed=3)
    for row, slots in hidden.items():
        mask[row, slots] = 0
    return ids, mask


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("hidden", [RIGHT, HOLE], ids=["right", "hole"])
@pytest.mark.parametrize("case", ANYWHERE, ids=str)
def test_a_row_padded_after_or_between_its_tokens_equals_transformers_on_the_row_alone(
    case: Case, hidden: dict[int, slice], runner: str, tiny_checkpoint, exported
) -> None:
    """Windows, chunks and temperatures count tokens, states forget none; a convolution knows of no hole in a step."""
    ids, mask = padded(hidden)
    decoder, model = Decoder(exported(case), runner), reference(tiny_checkpoint(case))
    if case in SHIFTED and hidden is HOLE:
        with pytest.raises(Exception, match=REFUSED):
            in_pieces(decoder, ids, mask)
        return
    found = in_pieces(decoder, ids, mask)
    for row, real in enumerate(mask.astype(bool)):
        with torch.no_grad():
            expected = model(torch.from_numpy(ids[row, real][None])).logits.numpy()
        decoder.check(expected, found[row, real][None])


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("case", LEFT_ONLY, ids=str)
def test_a_span_takes_padding_after_a_prompt_and_refuses_tokens_after_it(
    case: Case, runner: str, tiny_checkpoint, exported
) -> None:
    ids, mask = prompt(padding=0)
    mask[1, -11:] = 0
    positions = np.maximum(mask.cumsum(-1) - 1, 0)
    with torch.no_grad():
        made = reference(tiny_checkpoint(case))(
            *map(torch.from_numpy, (ids, mask)), position_ids=torch.from_numpy(positions)
        )
    decoder = Decoder(exported(case), runner)
    decoder.check(made.logits.numpy(), decoder.step(ids, positions, mask), mask.astype(bool))
    longer = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
    with pytest.raises(Exception, match=REFUSED):
        decoder.step(ids[:, :1], positions[:, -1:] + 1, longer)
    # A row that ended, or has not begun, is padding alone.
    longer[1, PROMPT] = 0
    decoder.step(ids[:, :1], positions[:, -1:] + 1, longer)
    decoder.past = {}
    mask[1] = 0
    decoder.step(ids, positions, mask)
    decoder.past = {}
    mask[1] = 1
    mask[1, 9] = 0
    with pytest.raises(Exception, match=REFUSED):
        decoder.step(ids, positions, mask)


def test_three_positions_a_token_match_transformers(tiny_checkpoint, exported) -> None:
    """mRoPE: time, height and width differ within an image."""
    ids, mask = prompt(padding=0)
    time = np.arange(PROMPT) // 4
    positions = np.stack([np.broadcast_to(p, ids.shape) for p in (time, time + np.arange(PROMPT) % 2, time * 2 % 7)])
    with torch.no_grad():
        made = reference(tiny_checkpoint("qwen3_5_moe"))(
            torch.from_numpy(ids), position_ids=torch.from_numpy(np.ascontiguousarray(positions))
        )
    ours = Decoder(exported("qwen3_5_moe"), "onnxruntime")
    ours.check(made.logits.numpy(), ours.step(ids, np.ascontiguousarray(positions), mask))


def check_rounded(expected: np.ndarray, found: np.ndarray, folder: Path) -> None:
    read = manifest.read(folder)
    allowed = tolerance(read.dtype, read)
    assert allowed.max_abs <= 5 * TOLERANCE[read.dtype].max_abs
    assert compare(expected, found, strays=allowed.strays).excess(allowed) <= 1


@pytest.mark.parametrize("case", others_slow(FIRST, IN_FP16), ids=str)
def test_fp16_in_onnx_runtime_is_within_its_tolerance_of_transformers_in_fp16(
    case: Case, tiny_checkpoint, exported
) -> None:
    ids, mask = prompt(padding=0)
    positions = np.maximum(mask.cumsum(-1) - 1, 0)
    with torch.no_grad():
        expected = reference(tiny_checkpoint(case), torch.float16)(torch.from_numpy(ids)).logits.numpy()
    folder = exported(case, "float16")
    found = Decoder(folder, "onnxruntime").step(ids, positions, mask)
    assert found.dtype == np.float16
    check_rounded(expected, found, folder)


@pytest.mark.parametrize("case", others_slow(FIRST, IN_BF16), ids=str)
def test_bf16_in_pytorch_is_within_its_tolerance_of_transformers_in_bf16(case: Case, tiny_checkpoint, exported) -> None:
    ids, mask = prompt(padding=0)
    positions = np.maximum(mask.cumsum(-1) - 1, 0)
    with torch.no_grad():
        expected = reference(tiny_checkpoint(case), torch.bfloat16)(torch.from_numpy(ids)).logits.float().numpy()
    folder = exported(case, "bfloat16")
    found = Decoder(folder, "torch").step(ids, positions, mask)
    check_rounded(expected, found.astype(np.float32), folder)
