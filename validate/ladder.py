"""The ladder: every rung from the published model to the exported file, each with its error against the last."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from polygraphy.backend.base import BaseRunner

from llmexport.export import onnx_file
from llmexport.export.archs import load, text_config
from llmexport.export.manifest import Manifest
from llmexport.export.spec import PAST, SEQUENCE, Step
from llmexport.validate import feeds, overflow
from llmexport.validate.compare import Difference, compare
from llmexport.validate.report import REFERENCE, Report, Rung
from llmexport.validate.runners import Feed, Refused, TorchRunner, TransformersRunner, onnx_runner
from llmexport.validate.tolerance import TOLERANCE, Tolerance
from llmexport.validate.tolerance import tolerance as whole_tolerance

DECODE_STEPS = 8
PIECE = 3  # tokens of a prompt's later piece
MOST_PAST = 4 * 2**30  # bytes of a random past in fp32, which is held for each step across a threshold
BLOCKS, WHOLE = "blocks: ONNX Runtime / PyTorch", "ONNX Runtime / PyTorch"
Progress = Callable[[str, int, int], None]


@dataclass
class Run:
    """What one runner made of the prompt, of every decode step and of steps across thresholds: outputs, and seconds."""

    outputs: list[Feed]
    seconds: list[float]
    chosen: list[np.ndarray]  # the tokens after each run but those across thresholds
    overflows: str | None = None  # the first step that made a number that is not finite


def climb(manifest: Manifest, *, tokens: int | None = None, seed: int = 0, progress: Progress) -> Report:
    """Runs every rung that this machine can run. Raises Mismatch if two runs have different shapes."""
    whole = manifest.data["block"] is None
    torch_runner = TorchRunner(manifest)
    with torch_runner:
        if whole:
            return _climb_whole(manifest, torch_runner, tokens, seed, progress)
        return _climb_block(manifest, torch_runner, seed, progress)


def _climb_whole(
    manifest: Manifest, torch_runner: TorchRunner, tokens: int | None, seed: int, progress: Progress
) -> Report:
    assembly = manifest.assembly
    prompt = feeds.prompt(assembly, tokens=tokens, seed=seed)
    progress("PyTorch", 0, 4)
    ours, recorded = _run_recorded(torch_runner, manifest, prompt)
    seconds = {"PyTorch": _medians(ours)}
    progress("transformers", 1, 4)
    rungs = [_reference(manifest, prompt, ours)]
    if manifest.dtype != "float32":
        rungs.append(_reference_float32(manifest, prompt))
    progress("blocks", 2, 4)
    reason = _not_runnable(manifest.dtype)
    if reason:
        rungs += [Rung(n, "not run", reason) for n in (BLOCKS, WHOLE)]
    else:
        model = onnx_file.load(manifest)
        rungs.append(_blocks(manifest, torch_runner, model, recorded))
        progress("ONNX Runtime", 3, 4)
        with onnx_runner(model, manifest.folder) as runner:
            found = _run(runner, manifest, prompt, ours.chosen)
        seconds["ONNX Runtime"] = _medians(found)
        rungs.append(_compare_runs(WHOLE, ours, found, prompt, whole_tolerance(manifest.dtype, assembly)))
        overflow.explain(rungs[-2:], manifest.dtype, ours.overflows or overflow.first_alone(rungs[-2]))
    progress("done", 4, 4)
    crossed, left = _beyond(manifest, prompt)
    for rung in rungs:
        if left and rung.status != "not run":
            held = "; masks, angles and temperatures were, alone" if rung.name == BLOCKS else ""
            note = f"not run past {left} tokens, whose caches are over {MOST_PAST >> 30} GiB in fp32{held}"
            rung.note = f"{rung.note}; {note}" if rung.note else note
    shape = {"batch": len(prompt.ids), "tokens": prompt.ids.shape[1], "decode_steps": DECODE_STEPS, "crossed": crossed}
    return Report(rungs, seconds, shape)


def _climb_block(manifest: Manifest, torch_runner: TorchRunner, seed: int, progress: Progress) -> Report:
    """One block alone, on random inputs."""
    reason = _not_runnable(manifest.dtype)
    if reason:
        return Report([Rung(WHOLE, "not run", reason)], {}, {})
    [step] = manifest.assembly.steps
    progress("block", 0, 1)
    with onnx_runner(onnx_file.load(manifest), manifest.folder) as runner:
        details = list(_alone(manifest, torch_runner, runner, step, seed))
    progress("block", 1, 1)
    return Report([_rung(WHOLE, TOLERANCE[manifest.dtype], details)], {}, {})


def _alone(
    manifest: Manifest, torch_runner: TorchRunner, runner: BaseRunner, step: Step, seed: int
) -> Iterator[dict[str, Any]]:
    """One step on random inputs, in PyTorch and as `runner` runs it."""
    for sizes in feeds.block_sizes(step.block):
        drawn = feeds.block_feed(step.block, manifest.dtype, sizes, seed)
        feed = dict(zip(step.inputs, drawn.values(), strict=True))
        found = runner.infer(feed, check_inputs=False)
        for output, expected in torch_runner.run_step(step, feed).items():
            place = {"step": step.name, "kind": step.block.kind, "run": f"{sizes[PAST]} + {sizes[SEQUENCE]} tokens"}
            yield {**place, "output": output, "difference": compare(expected, found[output])}


def _beyond(manifest: Manifest, prompt: feeds.Prompt) -> tuple[list[int], list[int]]:
    """The thresholds that the prompt does not pass: those to cross after a random past, and those too far for it."""
    config = text_config(load(manifest.data["arch"]).arch, manifest.data["config"])
    known = feeds.thresholds(manifest.assembly) | feeds.said(config)
    far = sorted(t for t in known if t >= prompt.ids.shape[1])
    near = [t for t in far if feeds.past_bytes(manifest.assembly, t) <= MOST_PAST]
    return near, far[len(near) :]


def _crossings(manifest: Manifest, prompt: feeds.Prompt) -> Iterator[tuple[str, Feed]]:
    """The steps across thresholds, by name, each made when it is asked for."""
    for t in _beyond(manifest, prompt)[0]:
        yield f"across {t}", feeds.crossing(manifest.assembly, t, manifest.dtype)


def _run_recorded(runner: TorchRunner, manifest: Manifest, prompt: feeds.Prompt) -> tuple[Run, dict[str, Feed]]:
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


def _run(runner: BaseRunner, manifest: Manifest, prompt: feeds.Prompt, chosen: list[np.ndarray]) -> Run:
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


def _reference(manifest: Manifest, prompt: feeds.Prompt, ours: Run, name: str = REFERENCE) -> Rung:
    """Our PyTorch against transformers, which carries its own cache."""
    if importlib.util.find_spec("transformers") is None:
        return Rung(name, "not run", "transformers is not installed: pip install transformers")
    try:
        with TransformersRunner(manifest) as runner:
            reference = _run(runner, manifest, prompt, ours.chosen)
    except Refused as refusal:
        return Rung(name, "not run", str(refusal))
    rung = _compare_runs(name, reference, ours, prompt, whole_tolerance(manifest.dtype, manifest.assembly))
    overflow.explain([rung], manifest.dtype, ours.overflows)
    return rung


def _reference_float32(manifest: Manifest, prompt: feeds.Prompt) -> Rung:
    """The same in fp32, whatever the export's dtype: 16-bit roundoff can hide a wrong model."""
    wide = manifest.in_float32()
    with TorchRunner(wide) as runner:
        ours, _ = _run_recorded(runner, wide, prompt)
    return _reference(wide, prompt, ours, f"{REFERENCE}, float32")


def _compare_runs(name: str, reference: Run, found: Run, prompt: feeds.Prompt, tolerance: Tolerance) -> Rung:
    """Logits of every step, of real tokens only, and the caches of the last decode step if both return them."""
    details: list[dict[str, Any]] = []
    last = len(reference.chosen) - 1
    for i, (expected, other) in enumerate(zip(reference.outputs, found.outputs, strict=True)):
        for output in expected.keys() & other.keys():
            # Where tokens may stray, their entries of the caches do.
            if output != "logits" and (i != last or tolerance.strays):
                continue
            real = prompt.mask.astype(bool) if output == "logits" and i == 0 else None
            difference = compare(expected[output], other[output], real, tolerance.strays)
            details.append({"step": i, "output": output, "difference": difference})
    return _rung(name, tolerance, details)


def _blocks(manifest: Manifest, torch_runner: TorchRunner, model: onnx.ModelProto, recorded: dict[str, Feed]) -> Rung:
    """Every step of the exported file alone, fed what PyTorch computed before it, so that no error adds up.

    What layers read (masks, angles, temperatures) is run across its thresholds as well, however far those are.
    """
    details: list[dict[str, Any]] = []
    for step in manifest.assembly.steps:
        part = onnx_file.cut_step(model, step, manifest.dtype)
        with onnx_runner(part, manifest.folder) as runner:
            for run, values in recorded.items():
                found = runner.infer({n: values[n] for n in step.inputs}, check_inputs=False)
                place = {"step": step.name, "kind": step.block.kind, "run": run}
                for output in step.outputs:
                    difference = compare(values[output], found[output])
                    details.append({**place, "output": output, "difference": difference})
            if not manifest.step_weights[step.name]:
                details.extend(_alone(manifest, torch_runner, runner, step, seed=0))
    return _rung(BLOCKS, TOLERANCE[manifest.dtype], details)


def _rung(name: str, tolerance: Tolerance, details: list[dict[str, Any]]) -> Rung:
    """Passes if every detail is within the tolerance, and no step's reference is everywhere one number, which a model
    that computes nothing would equal too; shows the one that comes nearest to the tolerance."""
    worst: Difference = max((d["difference"] for d in details), key=lambda d: d.excess(tolerance))
    varied = {d["step"] for d in details if d["difference"].spread != 0}
    flat = list(dict.fromkeys(d["step"] for d in details if d["step"] not in varied))
    status = "pass" if worst.excess(tolerance) <= 1 and not flat else "fail"
    note = f"proves nothing: the reference is one number everywhere, in step {flat[0]}" if flat else ""
    return Rung(name, status, note, worst, tolerance, details)


def _not_runnable(dtype: str) -> str:
    """Why ONNX Runtime's CPU provider cannot run a model of this dtype, or nothing."""
    return "ONNX Runtime has no bfloat16 MatMul on a CPU: validate a float32 export too" if dtype == "bfloat16" else ""


def _medians(run: Run) -> dict[str, float]:
    return {"prefill": run.seconds[0], "decode": statistics.median(run.seconds[1 : DECODE_STEPS + 1])}
