"""What is compared with what: single steps on the same inputs, and runs of whole models; and the rung that results."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from polygraphy.backend.base import BaseRunner

from llmexport.export.exported import Export, ExportedGraph
from llmexport.export.spec import FEATURES, IMAGES, PAST, SEQUENCE, SOURCE, TILES, Block, Step, summands
from llmexport.validate.compare import Difference, compare, median
from llmexport.validate.drive import Run, TorchDriver
from llmexport.validate.feeds import Feed, block_feed
from llmexport.validate.metrics import Scores, measure
from llmexport.validate.report import Rung, rung_of
from llmexport.validate.stages import Script
from llmexport.validate.thresholds import block_sizes
from llmexport.validate.tolerance import Tolerance, step_tolerance


@dataclass(frozen=True)
class Judge:
    """Says what a step of a graph should give: our PyTorch, and in 16 bits also our PyTorch in fp32."""

    export: Export
    graph: ExportedGraph
    torch: TorchDriver
    exact_torch: TorchDriver | None

    def compare(self, step: Step, run: str, feed: Feed, expected: Feed, found: Feed) -> Iterator[dict[str, Any]]:
        """The outputs of one step: in 16 bits as far from what fp32 gives as PyTorch is; in fp32 from PyTorch."""
        dtype, name = self.export.dtype, self.graph.name
        bound = step_tolerance(dtype, step)
        wide = {n: a.astype(np.float32) if a.dtype == dtype else a for n, a in feed.items()}
        exact = self.exact_torch.runners[name].run_step(step, wide) if self.exact_torch else None
        place = self.export.place(name, step.name)
        for output in step.outputs:
            reference = exact[output] if exact else expected[output]
            # The states of a step are made before its router is asked.
            own = bound if output == step.outputs[0] else dataclasses.replace(bound, strays=0.0)
            allowed = own.widened(compare(reference, expected[output], strays=own.strays)) if exact else own
            difference = compare(reference, found[output], strays=own.strays)
            detail = {"step": place, "kind": step.block.kind, "run": run, "output": output}
            yield {**detail, "difference": difference, "allowed": allowed}


def alone(judge: Judge, runner: BaseRunner, step: Step, seed: int) -> Iterator[dict[str, Any]]:
    """One step on random inputs, in PyTorch and as `runner` runs it."""
    for run, feed in feeds_alone(step, judge.export.dtype, seed):
        found = runner.infer(feed, check_inputs=False)
        expected = judge.torch.runners[judge.graph.name].run_step(step, feed)
        yield from judge.compare(step, run, feed, expected, found)


def feeds_alone(step: Step, dtype: str, seed: int) -> Iterator[tuple[str, Feed]]:
    """Random inputs of one step, each with the name of its run."""
    for sizes in block_sizes(step.block):
        drawn = block_feed(step.block, dtype, sizes, seed)
        feed = {value: drawn[port] for port, value in step.reads.items()}
        yield _said(step.block, sizes), feed


def _said(block: Block, sizes: Mapping[str, int]) -> str:
    """The sizes that one block is run at, for people."""
    axes = {n for p in block.inputs for d in p.shape if isinstance(d, str) for n in summands(d)}
    seen = [f"{sizes[n]} {n}" for n in (IMAGES, TILES, FEATURES, SOURCE) if n in axes & sizes.keys()]
    return ", ".join(seen) or f"{sizes[PAST]} + {sizes[SEQUENCE]} tokens"


def compare_runs(
    name: str,
    script: Script,
    reference: Run,
    found: Run,
    bounds: Mapping[str, Tolerance],
    yardsticks: Sequence[Run] = (),
) -> Rung:
    """The outputs of every stage that both return, of real tokens only: nobody reads what a model makes of padding,
    and a padded row that sees nothing may be anything. States are compared once, after the last piece.

    `bounds` are the tolerances by output. `yardsticks` are runs in 16 bits that are as right as any; how far they are
    off, there and in most places, widens the tolerance.
    """
    details: list[dict[str, Any]] = []
    yards: list[dict[int, Difference]] = []  # by yardstick
    scores: list[Scores] = []
    for i, (stage, expected, other) in enumerate(zip(script, reference.outputs, found.outputs, strict=True)):
        for output in (n for n in expected if n in other):
            tolerance = bounds[output]
            allowed = tolerance if stage.begins else tolerance.carried
            state = output in found.carried
            # Where tokens may stray, their entries of the caches do.
            if state and tolerance.strays:
                continue
            # What does not lie along the tokens is compared as a whole.
            real = stage.real if not state and other[output].shape[:2] == stage.real.shape else None
            difference = compare(expected[output], other[output], real, tolerance.strays)
            place = {"step": i, "stage": stage.name, "output": output}
            details.append({**place, "difference": difference, "allowed": allowed})
            measured = {k: y.outputs[i][output] for k, y in enumerate(yardsticks) if output in y.outputs[i]}
            yards.append({k: compare(expected[output], y, real, tolerance.strays) for k, y in measured.items()})
            if output == found.logits:
                every = np.ones(other[output].shape[:2], bool) if real is None else real
                scores.append(
                    Scores(stage.name, expected[output], other[output], every, stage.greedy and bool(found.carried))
                )
    typical = [median([y[k] for y in yards if k in y]) for k in range(len(yardsticks))]
    for detail, own in zip(details, yards, strict=True):
        for yard in (*typical, *own.values()):
            detail["allowed"] = detail["allowed"].widened(yard)
    return dataclasses.replace(rung_of(name, details), metrics=measure(scores))
