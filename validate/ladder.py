"""The ladder: every rung from the published model to the exported file, each with its error against the last."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from polygraphy.backend.base import BaseRunner

from llmexport.export import graph_file
from llmexport.export.exported import Export, ExportedGraph
from llmexport.export.progress import Progress, silent
from llmexport.export.spec import PAST, SEQUENCE, Step
from llmexport.validate import drive, overflow, stages
from llmexport.validate.compare import Difference, compare, median
from llmexport.validate.drive import Recorded, Run, TorchDriver, beyond, driver, follow, in_torch, record
from llmexport.validate.feeds import Feed, block_feed
from llmexport.validate.reference import Refused, Transformers
from llmexport.validate.report import REFERENCE, Report, Rung
from llmexport.validate.runners import not_runnable, onnx_runner
from llmexport.validate.stages import Script
from llmexport.validate.tolerance import MOST, Tolerance, step_tolerance
from llmexport.validate.tolerance import tolerance as whole_tolerance

BLOCKS, WHOLE = "blocks: ONNX Runtime / PyTorch", "ONNX Runtime / PyTorch"


def climb(export: Export, *, tokens: int | None = None, seed: int = 0, progress: Progress = silent) -> Report:
    """Runs every rung that this machine can run. Raises Mismatch if two runs have different shapes."""
    with in_torch(export) as ours, _exact(export) as exact:
        if export.block is None:
            return _climb_whole(export, ours, exact, tokens, seed, progress)
        return _climb_block(export, ours, exact, seed, progress)


@contextlib.contextmanager
def _exact(export: Export) -> Iterator[TorchDriver | None]:
    """Our PyTorch in fp32 for an export in 16 bits, which is judged by how far from it a right run is; else nothing."""
    if export.dtype == "float32":
        yield None
        return
    with in_torch(export.in_float32()) as exact:
        yield exact


def _climb_whole(
    export: Export,
    torch: TorchDriver,
    exact_torch: TorchDriver | None,
    tokens: int | None,
    seed: int,
    progress: Progress,
) -> Report:
    prompt = stages.prompt(export, tokens=tokens, seed=seed)
    progress("PyTorch", 0, 4)
    script, ours, recorded = record(torch, prompt)
    seconds = {"PyTorch": ours.medians}
    progress("transformers", 1, 4)
    exact = follow(exact_torch, export, script) if exact_torch else None
    rungs, theirs = _references(export, script, ours, exact)
    progress("blocks", 2, 4)
    if reason := not_runnable(export.dtype):
        rungs += [Rung(n, "not run", reason) for n in (BLOCKS, WHOLE)]
    else:
        models = {g.name: graph_file.load(export, g) for g in export.graphs}
        rungs.append(_blocks(export, torch, exact_torch, models, recorded))
        progress("ONNX Runtime", 3, 4)
        with driver(export, lambda graph: onnx_runner(models[graph.name], export.folder)) as runtime:
            found = follow(runtime, export, script, timed=True)
        seconds["ONNX Runtime"] = found.medians
        tolerance = whole_tolerance(export.dtype, export)
        yardsticks = [ours, *theirs] if exact else []
        rungs.append(_compare_runs(WHOLE, script, exact or ours, found, tolerance, yardsticks))
    alone = next((r for r in rungs if r.name == BLOCKS), None)
    # A model that is not finite in fp32 either does not overflow.
    lost = export.dtype if exact and exact.finite else "float32"
    overflow.explain(rungs, lost, ours.overflows or (overflow.first_alone(alone) if alone else None))
    progress("done", 4, 4)
    _note_uncrossed(rungs, export, beyond(export, prompt)[1])
    return Report(rungs, seconds, _shape(script))


def _note_uncrossed(rungs: list[Rung], export: Export, left: list[int]) -> None:
    """Adds to the note of every rung that was run the thresholds that were too far for it."""
    cached = drive.past_bytes(export, 1) > 0
    why = f"whose caches are over {drive.MOST_PAST >> 30} GiB in fp32" if cached else "for which --tokens is needed"
    for rung in rungs:
        if left and rung.status != "not run":
            held = "; masks, angles and temperatures were, alone" if rung.name == BLOCKS else ""
            note = f"not run past {left} tokens, {why}{held}"
            rung.note = f"{rung.note}; {note}" if rung.note else note


def _shape(script: Script) -> dict[str, Any]:
    """The sizes of a script, for the report."""
    batch, tokens = script[0].ids.shape
    crossed = [s.past + stages.BEFORE for s in script if s.kind == "crossing"]
    decodes = sum(s.kind == "decode" for s in script)
    return {"batch": batch, "tokens": tokens, "decode_steps": decodes, "crossed": crossed}


def _climb_block(
    export: Export, torch: TorchDriver, exact_torch: TorchDriver | None, seed: int, progress: Progress
) -> Report:
    """One block alone, on random inputs."""
    if reason := not_runnable(export.dtype):
        return Report([Rung(WHOLE, "not run", reason)], {}, {})
    [graph] = export.graphs
    [step] = graph.assembly.steps
    progress("block", 0, 1)
    with onnx_runner(graph_file.load(export, graph), export.folder) as runner:
        details = list(_alone(Judge(export, graph, torch, exact_torch), runner, step, seed))
    progress("block", 1, 1)
    return Report([_rung(WHOLE, details)], {}, {})


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


def _alone(judge: Judge, runner: BaseRunner, step: Step, seed: int) -> Iterator[dict[str, Any]]:
    """One step on random inputs, in PyTorch and as `runner` runs it."""
    for sizes in stages.block_sizes(step.block):
        drawn = block_feed(step.block, judge.export.dtype, sizes, seed)
        feed = {value: drawn[port] for port, value in step.reads.items()}
        found = runner.infer(feed, check_inputs=False)
        expected = judge.torch.runners[judge.graph.name].run_step(step, feed)
        yield from judge.compare(step, f"{sizes[PAST]} + {sizes[SEQUENCE]} tokens", feed, expected, found)


def _references(export: Export, script: Script, ours: Run, exact: Run | None) -> tuple[list[Rung], list[Run]]:
    """Our PyTorch against transformers, which carries its own cache; and the run of transformers, if there is one.

    In 16 bits transformers in fp32 is the reference, and transformers in 16 bits says how far from it is right. What
    our PyTorch makes of the model in fp32, `exact`, is a rung of its own: roundoff can hide a wrong model.
    """
    names = [REFERENCE] if exact is None else [REFERENCE, f"{REFERENCE}, float32"]
    tolerance = whole_tolerance(export.dtype, export)
    try:
        reference = follow(Transformers(export), export, script)
        if exact is None:
            return [_compare_runs(REFERENCE, script, reference, ours, tolerance)], [reference]
        wide = follow(Transformers(export.in_float32()), export, script)
    except Refused as refusal:
        return [Rung(n, "not run", str(refusal)) for n in names], []
    in_float32 = whole_tolerance("float32", export)
    rungs = [
        _compare_runs(names[0], script, wide, ours, tolerance, [reference]),
        _compare_runs(names[1], script, wide, exact, in_float32),
    ]
    return rungs, [reference]


def _compare_runs(
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
    return _rung(name, details)


def _blocks(
    export: Export,
    torch: TorchDriver,
    exact_torch: TorchDriver | None,
    models: Mapping[str, onnx.ModelProto],
    recorded: Recorded,
) -> Rung:
    """Every step of the exported files alone, fed what PyTorch computed before it, so that no error adds up.

    Steps without weights (masks, angles, temperatures) are run across their thresholds as well, however far those are.
    """
    details: list[dict[str, Any]] = []
    for graph, step in ((g, s) for g in export.graphs for s in g.assembly.steps):
        judge = Judge(export, graph, torch, exact_torch)
        part = graph_file.cut_step(models[graph.name], step, export.dtype)
        with onnx_runner(part, export.folder) as runner:
            for run, values in recorded.items():
                # A graph that was run once for a prompt has no values of the stages after it.
                if made := values.get(graph.name):
                    feed = {n: made[n] for n in step.inputs}
                    details.extend(judge.compare(step, run, feed, made, runner.infer(feed, check_inputs=False)))
            if not graph.step_weights[step.name]:
                details.extend(_alone(judge, runner, step, seed=0))
    return _rung(BLOCKS, details)


def _rung(name: str, details: list[dict[str, Any]]) -> Rung:
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
