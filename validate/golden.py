"""Makes a golden pack of an export: what it is fed, stage by stage, and what our PyTorch makes of it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path

from llmexport.export import graph_file
from llmexport.export.exported import Export
from llmexport.export.output import check_new_file
from llmexport.export.progress import Progress, silent
from llmexport.validate import judge, pack, references, stages
from llmexport.validate.compare import Mismatch
from llmexport.validate.drive import Driver, Run, TorchDriver, in_torch, record
from llmexport.validate.feeds import Feed, without_pictures
from llmexport.validate.ladder import exact_driver
from llmexport.validate.pack import Arrays, Header, Shot, expected_key, fed_key, real_key
from llmexport.validate.report import Rung
from llmexport.validate.runners import TorchRunner
from llmexport.validate.stages import Script, Stage
from llmexport.validate.tolerance import tolerances
from llmexport.validate.whole import Whole

MOST_PASTS = 2**30  # bytes of the random pasts of all crossings: a pack travels to where the engine is


class Heard:
    """A PyTorch runner that remembers what it was fed last."""

    def __init__(self, runner: TorchRunner) -> None:
        self.runner, self.fed = runner, Feed()

    def infer(self, feed: Feed, check_inputs: bool) -> Feed:
        self.fed = feed
        return self.runner.infer(feed, check_inputs=check_inputs)

    def last_inference_time(self) -> float:
        return self.runner.last_inference_time()

    @property
    def values(self) -> Feed:
        return self.runner.values


class Listener(Driver[Heard]):
    """A driver that notes what each graph was fed in each stage, but for what the stages before had made."""

    def __init__(self, torch: TorchDriver) -> None:
        super().__init__(torch.export, {n: Heard(r) for n, r in torch.runners.items()})
        self.shots: list[dict[str, Feed]] = []

    def run(self, stage: Stage) -> Feed:
        # Features are of one stage: the next one is fed its own, or none.
        known = set() if stage.begins else self._held.keys() - without_pictures(self.export).keys()
        outputs = super().run(stage)
        fed: dict[str, Feed] = {}
        for graph in (g for g in self.export.graphs if g.name in self.ran):
            carried = set() if stage.begins else graph.carried.keys()
            fed[graph.name] = {n: a for n, a in self.runners[graph.name].fed.items() if n not in carried | known}
            known |= {p.name for p in graph.assembly.outputs}
        self.shots.append(fed)
        return outputs


def make(
    export: Export, path: Path, *, tokens: int | None, seed: int, force: bool, progress: Progress = silent
) -> Header:
    """Writes the golden pack of an export, and returns what it says of itself.

    Raises Mismatch if our PyTorch is not what transformers is: nothing may be measured by it then.
    """
    check_new_file(path, force, pack.is_pack)
    if export.block is not None:
        raise Mismatch(f"{export.folder} is one block: a golden pack is of a whole model, export one")
    graph_file.check_files(export)
    with in_torch(export) as torch, exact_driver(export) as exact_torch:
        progress("PyTorch", 0, 3)
        listener = Listener(torch)
        script, ours, recorded = record(listener, stages.prompt(export, tokens=tokens, seed=seed))
        progress("transformers", 1, 3)
        whole = Whole(export, script, torch, exact_torch, ours, recorded, frozenset())
        reference = _reference(whole.rungs("transformers"), references.source(export.reference.made_by))
        expected = whole.exact or ours
        if not expected.finite:
            raise Mismatch(
                f"{export.folder} gives numbers that are not finite in fp32 either: see `llmexport validate`"
            )
        yardsticks = [ours, *whole.theirs] if whole.exact else []
        # A run is within what is allowed of itself; what that is, the pack says.
        own = judge.compare_runs("golden", script, expected, expected, tolerances(export.dtype, export), yardsticks)
    progress("write", 2, 3)
    kept = _within(script, listener.shots)
    header = Header(
        llmexport=importlib.metadata.version("llmexport"),
        arch=export.arch,
        dtype=export.dtype,
        seed=seed,
        reference=reference,
        graphs=graphs(export),
        stages=tuple(_stage(script[i], listener.shots[i], i, own, expected) for i in kept),
        left_out=tuple(s.name for i, s in enumerate(script) if i not in kept),
        arrays={},
    )
    arrays = Arrays()
    for place, i in enumerate(kept):
        arrays[real_key(place)] = script[i].real
        for graph, fed in listener.shots[i].items():
            arrays |= {fed_key(place, graph, n): a for n, a in fed.items()}
        arrays |= {expected_key(place, n): expected.outputs[i][n] for n in header.stages[place].allowed}
    pack.write(path, header, arrays, force=force)
    progress("write", 3, 3)
    return header


def graphs(export: Export) -> dict[str, pack.Graph]:
    """The graphs of an export as a pack of it has them."""
    return {
        g.name: pack.Graph(
            g.sha256,
            tuple(p.typed(export.dtype) for p in g.assembly.inputs),
            tuple(p.typed(export.dtype) for p in g.assembly.outputs),
            g.carried,
        )
        for g in export.graphs
    }


def _reference(rungs: Sequence[Rung], source: str) -> str:
    """What our PyTorch is, in words, compared with this `source` or the model's own class. Raises Mismatch if it is not
    what transformers is."""
    if wrong := next((r.name for r in rungs if r.status == "fail"), ""):
        raise Mismatch(f"{wrong} fails, so nothing can be measured by our PyTorch: see `llmexport validate`")
    if said := next((r.note for r in rungs if r.status == "not run"), ""):
        return f"PyTorch in float32, not compared with transformers ({said})"
    theirs = f"transformers {importlib.metadata.version('transformers')}"
    return f"PyTorch in float32, compared with {f'{source} ({theirs})' if source else theirs}"


def _stage(stage: Stage, shots: Mapping[str, Feed], place: int, own: Rung, expected: Run) -> pack.Stage:
    allowed = {d["output"]: d["allowed"] for d in own.details if d["step"] == place}
    whole = [n for n in allowed if n in expected.carried or expected.outputs[place][n].shape[:2] != stage.real.shape]
    return pack.Stage(
        name=stage.name,
        kind=stage.kind,
        greedy=stage.greedy and bool(expected.carried),
        shots=tuple(Shot(graph, tuple(fed)) for graph, fed in shots.items()),
        allowed=allowed,
        whole=tuple(whole),
        logits=expected.logits if expected.logits in allowed else None,
    )


def _within(script: Script, shots: Sequence[Mapping[str, Feed]]) -> list[int]:
    """The places of the stages to keep: all but the crossings after which the pasts would be over MOST_PASTS."""
    kept, held = [], 0
    for i, (stage, fed) in enumerate(zip(script, shots, strict=False)):
        size = sum(a.nbytes for feed in fed.values() for a in feed.values()) if stage.kind == "crossing" else 0
        if held + size <= MOST_PASTS:
            kept.append(i)
            held += size
    return kept
