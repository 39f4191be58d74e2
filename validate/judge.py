"""What is compared with what: single steps on the same inputs, and runs of whole models; and the rung that results."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from polygraphy.backend.base import BaseRunner

from llmexport.export.exported import Export, ExportedGraph
from llmexport.export.spec import PAST, SEQUENCE, Step
from llmexport.validate import stages
from llmexport.validate.compare import Difference, compare, median
from llmexport.validate.drive import Run, TorchDriver
from llmexport.validate.feeds import Feed, block_feed
from llmexport.validate.report import Rung
from llmexport.validate.stages import Script
from llmexport.validate.tolerance import MOST, Tolerance, step_tolerance


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
    for sizes in stages.block_sizes(step.block):
        drawn = block_feed(step.block, judge.export.dtype, sizes, seed)
        feed = {value: drawn[port] for port, value in step.reads.items()}
        found = runner.infer(feed, check_inputs=False)
        expected = judge.torch.runners[judge.graph.name].run_step(step, feed)
        yield from judge.compare(step, f"{sizes[PAST]} + {sizes[SEQUENCE]} tokens", feed, expected, found)


def compare_runs(
    name: str, script: Script, reference: Run, found: Run, tolerance: Tolerance, yardsticks: Sequence[Run] = ()
) -> Rung:
    """The outputs of every stage that both return, of real tokens only: nobody reads what a model makes of padding,
    and a padded row that sees nothing may be anything. States are compared once, after the last piece.

    `yardsticks` are runs in 16 bits that are as right as any; how far they are off, there and in most places, widens
    the tolerance.
    """
    details: list[dict[str, Any]] = []
    yards: list[list[Difference]] = []
    for i, (stage, expected, other) in enumerate(zip(script, reference.outputs, found.outputs, strict=True)):
        allowed = tolerance if stage.begins else tolerance.carried
        for output in (n for n in expected if n in other):
            state = output in found.carried
            # Where tokens may stray, their entries of the caches do.
            if state and tolerance.strays:
                continue
            # What does not lie along the tokens is compared as a whole.
            real = stage.real if not state and other[output].shape[:2] == stage.real.shape else None
            difference = compare(expected[output], other[output], real, tolerance.strays)
            details.append({"step": i, "output": output, "difference": difference, "allowed": allowed})
            measured = [y.outputs[i][output] for y in yardsticks if output in y.outputs[i]]
            yards.append([compare(expected[output], y, real, tolerance.strays) for y in measured])
    typical = [median([y[k] for y in yards if k < len(y)]) for k in range(len(yardsticks))]
    for detail, own in zip(details, yards, strict=True):
        for yard in (*typical, *own):
            detail["allowed"] = detail["allowed"].widened(yard)
    return rung_of(name, details)


def rung_of(name: str, details: list[dict[str, Any]]) -> Rung:
    """Passes if every detail is within what is allowed of it, and no step's reference is everywhere one number, which
    a model that computes nothing would equal too; shows the one that comes nearest to what is allowed."""
    worst = max(details, key=lambda d: d["difference"].excess(d["allowed"]))
    difference, tolerance = worst["difference"], worst["allowed"]
    varied = {d["step"] for d in details if d["difference"].spread != 0}
    flat = list(dict.fromkeys(d["step"] for d in details if d["step"] not in varied))
    status = "pass" if difference.excess(tolerance) <= 1 and not flat else "fail"
    note = f"proves nothing: the reference is one number everywhere, in step {flat[0]}" if flat else ""
    if status == "fail" and tolerance.cut and not flat:
        note = f"tells little: a right run may be {MOST} from fp32 in this type, validate a float32 export too"
    return Rung(name, status, note, difference, tolerance, details)
