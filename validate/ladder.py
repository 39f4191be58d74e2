"""The ladder: every rung from the published model to the engine, each with its error against the rung below."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import onnx
from polygraphy.backend.base import BaseRunner

from llmexport.export import onnx_file
from llmexport.export.manifest import Manifest
from llmexport.export.spec import BATCH, PAST, SEQUENCE
from llmexport.validate import feeds
from llmexport.validate.compare import Difference, compare
from llmexport.validate.runners import TOKENS, Feed, TorchRunner, TransformersRunner, onnx_runner
from llmexport.validate.tolerance import TOLERANCE, Tolerance

DECODE_STEPS = 8
Progress = Callable[[str, int, int], None]


@dataclass
class Rung:
    """One comparison; `difference` is the worst of its `details`.

    `status` is pass, fail or not run; `note` says why a rung was not run, or what it lacks.
    """

    name: str
    status: str
    note: str = ""
    difference: Difference | None = None
    tolerance: Tolerance | None = None
    details: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Report:
    """All rungs, in order, and the median seconds of a prefill and of a decode step by runner."""

    rungs: list[Rung]
    seconds: dict[str, dict[str, float]]
    prompt: dict[str, int]

    @property
    def passed(self) -> bool:
        """No rung failed, and at least one was run."""
        ran = [r for r in self.rungs if r.status != "not run"]
        return bool(ran) and all(r.status == "pass" for r in ran)

    def as_data(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


@dataclass
class Run:
    """What one runner made of the prompt and of every decode step: outputs, and its seconds."""

    outputs: list[Feed]
    seconds: list[float]


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
    start = feeds.prompt(assembly, tokens=tokens, seed=seed)
    first = feeds.prefill(assembly, start, manifest.dtype)
    where = start.mask.astype(bool)
    tolerance = TOLERANCE[manifest.dtype]
    progress("PyTorch", 0, 4)
    ours, recorded = _run_recorded(torch_runner, first)
    tokens_chosen = [o["logits"][:, -1:].argmax(-1) for o in ours.outputs]
    seconds = {"PyTorch": _medians(ours)}
    progress("transformers", 1, 4)
    rungs = [_reference(manifest, first, ours, tokens_chosen, where, tolerance)]
    progress("blocks", 2, 4)
    runnable = _not_runnable(manifest.dtype)
    if runnable:
        rungs += [Rung(n, "not run", runnable) for n in ("blocks: ONNX Runtime / PyTorch", "ONNX Runtime / PyTorch")]
    else:
        model = onnx_file.load(manifest)
        rungs.append(_blocks(manifest, model, recorded))
        progress("ONNX Runtime", 3, 4)
        with onnx_runner(model, manifest.folder) as runner:
            found = _run(runner, first, tokens_chosen)
        seconds["ONNX Runtime"] = _medians(found)
        rungs.append(_compare_runs("ONNX Runtime / PyTorch", ours, found, where, tolerance))
    progress("done", 4, 4)
    unreached = [w for w in feeds.windows(assembly) if w >= start.ids.shape[1]]
    if unreached:
        note = f"windows of {unreached} tokens not reached by {start.ids.shape[1]}: give --tokens"
        for rung in rungs:
            rung.note = f"{rung.note}; {note}" if rung.note else note
    shape = {"batch": len(start.ids), "tokens": start.ids.shape[1], "decode_steps": DECODE_STEPS}
    return Report(rungs, seconds, shape)


def _climb_block(manifest: Manifest, torch_runner: TorchRunner, seed: int, progress: Progress) -> Report:
    """One block alone, on random inputs: a prompt without a past, and one token with one."""
    reason = _not_runnable(manifest.dtype)
    name = "ONNX Runtime / PyTorch"
    if reason:
        return Report([Rung(name, "not run", reason)], {}, {})
    details: list[dict[str, Any]] = []
    with onnx_runner(onnx_file.load(manifest), manifest.folder) as runner:
        for i, sizes in enumerate(({BATCH: 2, SEQUENCE: 13, PAST: 0}, {BATCH: 3, SEQUENCE: 1, PAST: 21})):
            progress("block", i, 2)
            feed = feeds.random_feed(manifest.assembly.inputs, manifest.dtype, sizes, seed)
            expected, found = torch_runner.infer(feed, check_inputs=False), runner.infer(feed, check_inputs=False)
            for output in expected:
                difference = compare(expected[output], found[output])
                details.append({"output": output, **sizes, "difference": difference})
    progress("block", 2, 2)
    tolerance = TOLERANCE[manifest.dtype]
    return Report([_rung(name, tolerance, details)], {}, {})


def _run_recorded(runner: TorchRunner, feed: Feed) -> tuple[Run, list[Feed]]:
    """Greedy decoding; besides the outputs, all values of the prompt's run and of the last decode step."""
    run, recorded = Run([], []), []
    for i in range(DECODE_STEPS + 1):
        outputs = runner.infer(feed, check_inputs=False)
        run.outputs.append(outputs)
        run.seconds.append(runner.last_inference_time())
        if i in (0, DECODE_STEPS):
            recorded.append(runner.values)
        feed = feeds.advance(feed, outputs, outputs["logits"][:, -1:].argmax(-1))
    return run, recorded


def _run(runner: BaseRunner, feed: Feed, chosen: list[np.ndarray]) -> Run:
    """The same tokens, but the runner's own caches, so that an error in a cache adds up."""
    run = Run([], [])
    for tokens in chosen:
        outputs = {n: np.copy(a) for n, a in runner.infer(feed, check_inputs=False).items()}
        run.outputs.append(outputs)
        run.seconds.append(runner.last_inference_time())
        feed = feeds.advance(feed, outputs, tokens)
    return run


def _reference(
    manifest: Manifest,
    first: Feed,
    ours: Run,
    chosen: list[np.ndarray],
    where: np.ndarray,
    tolerance: Tolerance,
) -> Rung:
    """Our PyTorch against transformers, which carries its own cache."""
    name = "PyTorch / transformers"
    if importlib.util.find_spec("transformers") is None:
        return Rung(name, "not run", "transformers is not installed: pip install 'llmexport[test]'")
    tokens = {n: first[n] for n in TOKENS}
    with TransformersRunner(manifest) as runner:
        reference = _run(runner, tokens, chosen)
    return _compare_runs(name, reference, ours, where, tolerance)


def _compare_runs(name: str, reference: Run, found: Run, where: np.ndarray, tolerance: Tolerance) -> Rung:
    """Logits of every step, of real tokens only, and the caches of the last step if both return them."""
    details: list[dict[str, Any]] = []
    last = len(reference.outputs) - 1
    for i, (expected, other) in enumerate(zip(reference.outputs, found.outputs, strict=True)):
        for output in expected.keys() & other.keys():
            if output != "logits" and i != last:
                continue
            real = where if output == "logits" and i == 0 else None
            difference = compare(expected[output], other[output], real)
            same = bool((expected[output][:, -1].argmax(-1) == other[output][:, -1].argmax(-1)).all())
            extra = {"same_tokens": same} if output == "logits" else {}
            details.append({"step": i, "output": output, "difference": difference, **extra})
    return _rung(name, tolerance, details)


def _blocks(manifest: Manifest, model: onnx.ModelProto, recorded: list[Feed]) -> Rung:
    """Every step of the exported file alone, fed what PyTorch computed before it, so that no error adds up."""
    details: list[dict[str, Any]] = []
    for step in manifest.assembly.steps:
        part = onnx_file.cut_step(model, step, manifest.dtype)
        with onnx_runner(part, manifest.folder) as runner:
            for run, values in enumerate(recorded):
                found = runner.infer({n: values[n] for n in step.inputs}, check_inputs=False)
                for output in step.outputs:
                    difference = compare(values[output], found[output])
                    place = {"step": step.name, "kind": step.block.kind, "run": ("prefill", "decode")[run]}
                    details.append({**place, "output": output, "difference": difference})
    return _rung("blocks: ONNX Runtime / PyTorch", TOLERANCE[manifest.dtype], details)


def _rung(name: str, tolerance: Tolerance, details: list[dict[str, Any]]) -> Rung:
    """Passes if every detail is within the tolerance; shows the one that comes nearest to it."""
    worst: Difference = max((d["difference"] for d in details), key=lambda d: d.excess(tolerance))
    status = "pass" if worst.excess(tolerance) <= 1 else "fail"
    return Rung(name, status, "", worst, tolerance, details)


def _not_runnable(dtype: str) -> str:
    """Why ONNX Runtime's CPU provider cannot run a model of this dtype, or nothing."""
    return "ONNX Runtime has no bfloat16 MatMul on a CPU: validate a float32 export too" if dtype == "bfloat16" else ""


def _medians(run: Run) -> dict[str, float]:
    return {"prefill": run.seconds[0], "decode": statistics.median(run.seconds[1:])}
