"""The ladder: every rung from the published model to the exported file, each with its error against the last."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from polygraphy.backend.base import BaseRunner

from llmexport.export import onnx_file
from llmexport.export.exported import Export
from llmexport.export.progress import Progress, silent
from llmexport.export.spec import PAST, SEQUENCE, Step
from llmexport.validate import feeds, overflow, runs
from llmexport.validate.compare import Difference, compare, median
from llmexport.validate.reference import Refused, TransformersRunner, unable
from llmexport.validate.report import REFERENCE, Report, Rung
from llmexport.validate.runners import Feed, TorchRunner, not_runnable, onnx_runner
from llmexport.validate.runs import DECODE_STEPS, Run, beyond, follow, medians, record
from llmexport.validate.tolerance import MOST, Tolerance, step_tolerance
from llmexport.validate.tolerance import tolerance as whole_tolerance

BLOCKS, WHOLE = "blocks: ONNX Runtime / PyTorch", "ONNX Runtime / PyTorch"


def climb(manifest: Export, *, tokens: int | None = None, seed: int = 0, progress: Progress = silent) -> Report:
    """Runs every rung that this machine can run. Raises Mismatch if two runs have different shapes."""
    whole = manifest.block is None
    with TorchRunner(manifest) as torch_runner, _exact(manifest) as exact:
        if whole:
            return _climb_whole(manifest, torch_runner, exact, tokens, seed, progress)
        return _climb_block(manifest, torch_runner, exact, seed, progress)


@contextlib.contextmanager
def _exact(manifest: Export) -> Iterator[TorchRunner | None]:
    """Our PyTorch in fp32 for an export in 16 bits, which is judged by how far from it a right run is; else nothing."""
    if manifest.dtype == "float32":
        yield None
        return
    with TorchRunner(manifest.in_float32()) as runner:
        yield runner


def _climb_whole(
    manifest: Export,
    torch_runner: TorchRunner,
    exact_runner: TorchRunner | None,
    tokens: int | None,
    seed: int,
    progress: Progress,
) -> Report:
    assembly = manifest.assembly
    prompt = feeds.prompt(assembly, tokens=tokens, seed=seed)
    progress("PyTorch", 0, 4)
    ours, recorded = record(torch_runner, manifest, prompt)
    seconds = {"PyTorch": medians(ours)}
    progress("transformers", 1, 4)
    exact = follow(exact_runner, manifest.in_float32(), prompt, ours.chosen) if exact_runner else None
    rungs, theirs = _references(manifest, prompt, ours, exact)
    progress("blocks", 2, 4)
    reason = not_runnable(manifest.dtype)
    if reason:
        rungs += [Rung(n, "not run", reason) for n in (BLOCKS, WHOLE)]
    else:
        model = onnx_file.load(manifest, manifest.graphs[0])
        rungs.append(_blocks(manifest, torch_runner, exact_runner, model, recorded))
        progress("ONNX Runtime", 3, 4)
        with onnx_runner(model, manifest.folder) as runner:
            found = follow(runner, manifest, prompt, ours.chosen)
        seconds["ONNX Runtime"] = medians(found)
        tolerance = whole_tolerance(manifest.dtype, assembly)
        yardsticks = [ours, *theirs] if exact else []
        rungs.append(_compare_runs(WHOLE, exact or ours, found, prompt, tolerance, yardsticks))
    alone = next((r for r in rungs if r.name == BLOCKS), None)
    # A model that is not finite in fp32 either does not overflow.
    lost = manifest.dtype if exact and all(np.isfinite(o["logits"]).all() for o in exact.outputs) else "float32"
    overflow.explain(rungs, lost, ours.overflows or (overflow.first_alone(alone) if alone else None))
    progress("done", 4, 4)
    crossed, left = beyond(manifest, prompt)
    for rung in rungs:
        if left and rung.status != "not run":
            held = "; masks, angles and temperatures were, alone" if rung.name == BLOCKS else ""
            note = f"not run past {left} tokens, whose caches are over {runs.MOST_PAST >> 30} GiB in fp32{held}"
            rung.note = f"{rung.note}; {note}" if rung.note else note
    shape = {"batch": len(prompt.ids), "tokens": prompt.ids.shape[1], "decode_steps": DECODE_STEPS, "crossed": crossed}
    return Report(rungs, seconds, shape)


def _climb_block(
    manifest: Export, torch_runner: TorchRunner, exact_runner: TorchRunner | None, seed: int, progress: Progress
) -> Report:
    """One block alone, on random inputs."""
    reason = not_runnable(manifest.dtype)
    if reason:
        return Report([Rung(WHOLE, "not run", reason)], {}, {})
    [step] = manifest.assembly.steps
    progress("block", 0, 1)
    with onnx_runner(onnx_file.load(manifest, manifest.graphs[0]), manifest.folder) as runner:
        details = list(_alone(manifest, torch_runner, exact_runner, runner, step, seed))
    progress("block", 1, 1)
    return Report([_rung(WHOLE, details)], {}, {})


def _alone(
    manifest: Export,
    torch_runner: TorchRunner,
    exact_runner: TorchRunner | None,
    runner: BaseRunner,
    step: Step,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """One step on random inputs, in PyTorch and as `runner` runs it."""
    for sizes in feeds.block_sizes(step.block):
        drawn = feeds.block_feed(step.block, manifest.dtype, sizes, seed)
        feed = dict(zip(step.inputs, drawn.values(), strict=True))
        found = runner.infer(feed, check_inputs=False)
        expected, run = torch_runner.run_step(step, feed), f"{sizes[PAST]} + {sizes[SEQUENCE]} tokens"
        yield from _compare_step(manifest, exact_runner, step, run, feed, expected, found)


def _compare_step(
    manifest: Export,
    exact_runner: TorchRunner | None,
    step: Step,
    run: str,
    feed: Feed,
    expected: Feed,
    found: Feed,
) -> Iterator[dict[str, Any]]:
    """The outputs of one step: as far from what it gives in fp32 as PyTorch is in 16 bits; in fp32 from PyTorch."""
    bound = step_tolerance(manifest.dtype, step.block)
    wide = {n: a.astype(np.float32) if a.dtype == manifest.dtype else a for n, a in feed.items()}
    exact = exact_runner.run_step(step, wide) if exact_runner else None
    for output in step.outputs:
        place = {"step": step.name, "kind": step.block.kind, "run": run, "output": output}
        reference = exact[output] if exact else expected[output]
        # The states of a step are made before its router is asked.
        own = bound if output == step.outputs[0] else dataclasses.replace(bound, strays=0.0)
        allowed = own.widened(compare(reference, expected[output], strays=own.strays)) if exact else own
        yield {**place, "difference": compare(reference, found[output], strays=own.strays), "allowed": allowed}


def _references(manifest: Export, prompt: feeds.Prompt, ours: Run, exact: Run | None) -> tuple[list[Rung], list[Run]]:
    """Our PyTorch against transformers, which carries its own cache; and the run of transformers, if there is one.

    In 16 bits transformers in fp32 is the reference, and transformers in 16 bits says how far from it is right. What
    our PyTorch makes of the model in fp32, `exact`, is a rung of its own: roundoff can hide a wrong model.
    """
    names = [REFERENCE] if exact is None else [REFERENCE, f"{REFERENCE}, float32"]
    tolerance = whole_tolerance(manifest.dtype, manifest.assembly)
    try:
        reference = _run_transformers(manifest, prompt, ours.chosen)
        if exact is None:
            return [_compare_runs(REFERENCE, reference, ours, prompt, tolerance)], [reference]
        wide = _run_transformers(manifest.in_float32(), prompt, ours.chosen)
    except Refused as refusal:
        return [Rung(n, "not run", str(refusal)) for n in names], []
    in_float32 = whole_tolerance("float32", manifest.assembly)
    rungs = [
        _compare_runs(names[0], wide, ours, prompt, tolerance, [reference]),
        _compare_runs(names[1], wide, exact, prompt, in_float32),
    ]
    return rungs, [reference]


def _run_transformers(manifest: Export, prompt: feeds.Prompt, chosen: list[np.ndarray]) -> Run:
    """Raises Refused where transformers cannot say what is right."""
    if refusal := unable():
        raise Refused(refusal)
    with TransformersRunner(manifest) as runner:
        return follow(runner, manifest, prompt, chosen)


def _compare_runs(
    name: str,
    reference: Run,
    found: Run,
    prompt: feeds.Prompt,
    tolerance: Tolerance,
    yardsticks: Sequence[Run] = (),
) -> Rung:
    """Logits of every step, of real tokens only, and the caches of the last decode step if both return them.

    `yardsticks` are runs in 16 bits that are as right as any; how far they are off, there and in most places, widens
    the tolerance.
    """
    details: list[dict[str, Any]] = []
    yards: list[list[Difference]] = []
    last = len(reference.chosen) - 1
    for i, (expected, other) in enumerate(zip(reference.outputs, found.outputs, strict=True)):
        for output in expected.keys() & other.keys():
            # Where tokens may stray, their entries of the caches do.
            if output != "logits" and (i != last or tolerance.strays):
                continue
            real = prompt.mask.astype(bool) if output == "logits" and i == 0 else None
            difference = compare(expected[output], other[output], real, tolerance.strays)
            allowed = tolerance.carried if 0 < i <= last else tolerance
            details.append({"step": i, "output": output, "difference": difference, "allowed": allowed})
            measured = [y.outputs[i][output] for y in yardsticks if output in y.outputs[i]]
            yards.append([compare(expected[output], y, real, tolerance.strays) for y in measured])
    typical = [median([y[k] for y in yards if k < len(y)]) for k in range(len(yardsticks))]
    for detail, own in zip(details, yards, strict=True):
        for yard in (*typical, *own):
            detail["allowed"] = detail["allowed"].widened(yard)
    return _rung(name, details)


def _blocks(
    manifest: Export,
    torch_runner: TorchRunner,
    exact_runner: TorchRunner | None,
    model: onnx.ModelProto,
    recorded: dict[str, Feed],
) -> Rung:
    """Every step of the exported file alone, fed what PyTorch computed before it, so that no error adds up.

    What layers read (masks, angles, temperatures) is run across its thresholds as well, however far those are.
    """
    details: list[dict[str, Any]] = []
    for step in manifest.assembly.steps:
        part = onnx_file.cut_step(model, step, manifest.dtype)
        with onnx_runner(part, manifest.folder) as runner:
            for run, values in recorded.items():
                feed = {n: values[n] for n in step.inputs}
                found = runner.infer(feed, check_inputs=False)
                details.extend(_compare_step(manifest, exact_runner, step, run, feed, values, found))
            if not manifest.step_weights[step.name]:
                details.extend(_alone(manifest, torch_runner, exact_runner, runner, step, seed=0))
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
