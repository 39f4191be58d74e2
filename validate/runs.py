"""What a runner makes of a prompt, of decode steps and of steps across thresholds."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from polygraphy.backend.base import BaseRunner

from llmexport.export.exported import Export
from llmexport.validate import feeds, overflow
from llmexport.validate.runners import Feed, TorchRunner

DECODE_STEPS = 8
PIECE = 3  # tokens of a prompt's later piece
MOST_PAST = 4 * 2**30  # bytes of a random past in fp32, which is held for each step across a threshold


@dataclass
class Run:
    """What one runner made of the prompt, of every decode step and of steps across thresholds: outputs, and seconds."""

    outputs: list[Feed]
    seconds: list[float]
    chosen: list[np.ndarray]  # the tokens after each run but those across thresholds
    overflows: str | None = None  # the first step that made a number that is not finite


def record(runner: TorchRunner, manifest: Export, prompt: feeds.Prompt) -> tuple[Run, dict[str, Feed]]:
    """The prompt, greedy decoding, three tokens at once and what crosses thresholds; and all values of those runs
    that are no decode steps."""
    feed = feeds.prefill(manifest.assembly, prompt, manifest.dtype)
    run, recorded = Run([], [], []), {}
    for i in range(DECODE_STEPS + 2):
        outputs = runner.infer(feed, check_inputs=False)
        greedy = outputs["logits"][:, -1:].argmax(-1)
        run.chosen.append(greedy if i < DECODE_STEPS else prompt.ids[:, :PIECE])
        run.outputs.append(outputs)
        run.seconds.append(runner.last_inference_time())
        run.overflows = run.overflows or overflow.first_step(manifest.assembly, runner.values)
        if i in (0, DECODE_STEPS + 1):
            recorded["last" if i else "prompt"] = runner.values
        feed = feeds.advance(feed, outputs, run.chosen[-1])
    for name, feed in _crossings(manifest, prompt):
        run.outputs.append(_logits(runner, feed))
        run.overflows = run.overflows or overflow.first_step(manifest.assembly, runner.values)
        recorded[name] = runner.values
    return run, recorded


def follow(runner: BaseRunner, manifest: Export, prompt: feeds.Prompt, chosen: list[np.ndarray]) -> Run:
    """The same tokens, but the runner's own caches, so that an error in a cache adds up."""
    run, feed = Run([], [], chosen), feeds.prefill(manifest.assembly, prompt, manifest.dtype)
    for tokens in chosen:
        outputs = {n: np.copy(a) for n, a in runner.infer(feed, check_inputs=False).items()}
        run.outputs.append(outputs)
        run.seconds.append(runner.last_inference_time())
        feed = feeds.advance(feed, outputs, tokens)
    run.outputs += [_logits(runner, crossing) for _, crossing in _crossings(manifest, prompt)]
    return run


def _logits(runner: BaseRunner, feed: Feed) -> Feed:
    return {"logits": np.copy(runner.infer(feed, check_inputs=False)["logits"])}


def beyond(manifest: Export, prompt: feeds.Prompt) -> tuple[list[int], list[int]]:
    """The thresholds that the prompt does not pass: those to cross after a random past, and those too far for it."""
    known = feeds.thresholds(manifest.assembly) | feeds.said(manifest.text_config)
    far = sorted(t for t in known if t >= prompt.ids.shape[1])
    near = [t for t in far if feeds.past_bytes(manifest.assembly, t) <= MOST_PAST]
    return near, far[len(near) :]


def _crossings(manifest: Export, prompt: feeds.Prompt) -> Iterator[tuple[str, Feed]]:
    """The steps across thresholds, by name, each made when it is asked for."""
    for t in beyond(manifest, prompt)[0]:
        yield f"across {t}", feeds.crossing(manifest.assembly, t, manifest.dtype)


def medians(run: Run) -> dict[str, float]:
    return {"prefill": run.seconds[0], "decode": statistics.median(run.seconds[1 : DECODE_STEPS + 1])}
