"""The ladder: every rung from the published model to what is deployed, each with its error against the last."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from llmexport.export import graph_file
from llmexport.export.errors import ExportError
from llmexport.export.exported import Export
from llmexport.export.progress import Progress, silent
from llmexport.validate import drive, overflow, stages
from llmexport.validate.bisect import first_fault, or_stopped, with_blocks
from llmexport.validate.drive import Recorded, Run, TorchDriver, beyond, driver, follow, in_torch, record
from llmexport.validate.forms import FORMS, Form
from llmexport.validate.judge import Judge, alone, compare_runs, rung_of
from llmexport.validate.reference import Refused, Transformers
from llmexport.validate.report import REFERENCE, Report, Rung
from llmexport.validate.runners import not_runnable, onnx_runner
from llmexport.validate.stages import Script
from llmexport.validate.tolerance import tolerance

BLOCKS = "blocks: ONNX Runtime / PyTorch"
# By name, in order: against code that nobody here wrote, block by block, and as each form.
RUNGS = ("transformers", "blocks", *(f.rung for f in FORMS))


def check_rungs(names: Collection[str] | None) -> frozenset[str] | None:
    """The rungs of these names; all, if none is named. Raises ExportError on a name that no rung has."""
    for name in names or ():
        if name not in RUNGS:
            raise ExportError(f"there is no rung {name!r}: choose among {', '.join(RUNGS)}")
    return frozenset(names) if names else None


def climb(
    export: Export,
    *,
    rungs: Collection[str] | None = None,
    tokens: int | None = None,
    seed: int = 0,
    bisect: bool = False,
    progress: Progress = silent,
) -> Report:
    """Runs the rungs of these names, or every rung that this machine can run, and says of each other one why not.

    bisect: what fails is traced to its block and node. Raises Mismatch if two runs have different shapes, ExportError
    if there is no rung of a name, or no node of this type can be run.
    """
    asked = check_rungs(rungs)
    if bisect:
        asked = with_blocks(export, asked)
    with in_torch(export) as ours, _exact(export) as exact:
        if export.block is not None:
            return _climb_block(export, asked, ours, exact, seed, bisect, progress)
        prompt = stages.prompt(export, tokens=tokens, seed=seed)
        return _climb_whole(export, asked, ours, exact, prompt, bisect, progress)


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
    asked: frozenset[str] | None,
    torch: TorchDriver,
    exact_torch: TorchDriver | None,
    prompt: stages.Stage,
    bisect: bool,
    progress: Progress,
) -> Report:
    names = [n for n in RUNGS if asked is None or n in asked]
    progress("PyTorch", 0, 1 + len(names))
    script, ours, recorded = record(torch, prompt)
    whole = Whole(export, script, torch, exact_torch, ours, recorded, asked or frozenset())
    rungs: list[Rung] = []
    for place, name in enumerate(names):
        progress(name, 1 + place, 1 + len(names))
        for rung in or_stopped(whole.rungs, name, bisect):
            rung.key = name
            rungs.append(rung)
    apart = next((r for r in rungs if r.name == BLOCKS), None)
    # A model that is not finite in fp32 either does not overflow.
    lost = export.dtype if whole.exact and whole.exact.finite else "float32"
    overflow.explain(rungs, lost, ours.overflows or (overflow.first_alone(apart) if apart else None))
    progress("done", 1 + len(names), 1 + len(names))
    _note_uncrossed(rungs, export, beyond(export, prompt)[1])
    runs = {"PyTorch": ours, **whole.forms}
    seconds = {n: run.medians for n, run in runs.items()}
    calls = {n: run.calls for n, run in runs.items()}
    found = first_fault(export, rungs, recorded) if bisect else None
    chosen = tuple(n for n in RUNGS if n in (asked or ()))
    return Report(rungs, seconds, _shape(script), asked=chosen, calls=calls, bisect=found)


@dataclass
class Whole:
    """A whole model on its rungs: the run of our PyTorch, whose tokens the others follow, and what they made of them.

    theirs: runs of transformers in the export's own dtype. forms: the runs of forms, by the name of their runner.
    """

    export: Export
    script: Script
    torch: TorchDriver
    exact_torch: TorchDriver | None
    ours: Run
    recorded: Recorded
    asked: frozenset[str]
    theirs: list[Run] = field(default_factory=list)
    forms: dict[str, Run] = field(default_factory=dict)

    @cached_property
    def exact(self) -> Run | None:
        return follow(self.exact_torch, self.export, self.script) if self.exact_torch else None

    def rungs(self, name: str) -> list[Rung]:
        if name == "transformers":
            return self._references()
        if name == "blocks":
            return [self._blocks()]
        return [self._form(next(f for f in FORMS if f.rung == name))]

    def _form(self, form: Form) -> Rung:
        """A form on the script: in fp32 against the form that it follows, in 16 bits as far from fp32 as right runs
        are."""
        if reason := form.unable(self.export, form.rung in self.asked):
            return Rung(form.title, "not run", reason)
        found = self._run(form)
        before = self._run(form.against) if form.against and not form.against.unable(self.export, True) else None
        yardsticks = [self.ours, *self.theirs, *([before] if before else [])] if self.exact else []
        expected = self.exact or before or self.ours
        allowed = tolerance(self.export.dtype, self.export)
        rung = compare_runs(form.title, self.script, expected, found, allowed, yardsticks)
        if rung.status == "fail" and (place := form.trace(self.export, self.recorded)):
            rung.note = f"{rung.note}; {place}" if rung.note else place
        return rung

    def _run(self, form: Form) -> Run:
        name = form.title.partition(" / ")[0]
        if name not in self.forms:
            with driver(self.export, lambda graph: form.runner(self.export, graph)) as model:
                self.forms[name] = follow(model, self.export, self.script, timed=True)
        return self.forms[name]

    def _references(self) -> list[Rung]:
        """Our PyTorch against transformers, which carries its own cache.

        In 16 bits transformers in fp32 is the reference, and transformers in 16 bits says how far from it is right.
        What our PyTorch makes of the model in fp32 is a rung of its own: roundoff can hide a wrong model.
        """
        export, script = self.export, self.script
        names = [REFERENCE] if self.exact is None else [REFERENCE, f"{REFERENCE}, float32"]
        allowed = tolerance(export.dtype, export)
        try:
            reference = follow(Transformers(export), export, script)
            self.theirs.append(reference)
            if self.exact is None:
                return [compare_runs(REFERENCE, script, reference, self.ours, allowed)]
            wide = follow(Transformers(export.in_float32()), export, script)
        except Refused as refusal:
            return [Rung(n, "not run", str(refusal)) for n in names]
        return [
            compare_runs(names[0], script, wide, self.ours, allowed, [reference]),
            compare_runs(names[1], script, wide, self.exact, tolerance("float32", export)),
        ]

    def _blocks(self) -> Rung:
        """Every step of the exported files alone, fed what PyTorch computed before it, so that no error adds up.

        Steps without weights (masks, angles, temperatures) are run across their thresholds as well, however far those
        are.
        """
        export = self.export
        if reason := not_runnable(export.dtype):
            return Rung(BLOCKS, "not run", reason)
        models = {g.name: graph_file.load(export, g) for g in export.graphs}
        details: list[Mapping[str, Any]] = []
        for graph, step in ((g, s) for g in export.graphs for s in g.assembly.steps):
            judge = Judge(export, graph, self.torch, self.exact_torch)
            part = graph_file.cut_step(models[graph.name], step, export.dtype)
            with onnx_runner(part, export.folder) as runner:
                for run, values in self.recorded.items():
                    # A graph that was run once for a prompt has no values of the stages after it.
                    if made := values.get(graph.name):
                        feed = {n: made[n] for n in step.inputs}
                        details.extend(judge.compare(step, run, feed, made, runner.infer(feed, check_inputs=False)))
                if not graph.step_weights[step.name]:
                    details.extend(alone(judge, runner, step, seed=0))
        return rung_of(BLOCKS, details)


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
    export: Export,
    asked: frozenset[str] | None,
    torch: TorchDriver,
    exact_torch: TorchDriver | None,
    seed: int,
    bisect: bool,
    progress: Progress,
) -> Report:
    """One block alone, on random inputs, in each form."""
    [graph] = export.graphs
    [step] = graph.assembly.steps
    judge = Judge(export, graph, torch, exact_torch)
    forms = [f for f in FORMS if asked is None or f.rung in asked]
    if not forms:
        raise ExportError(f"{export.folder} is one block, whose rungs are {', '.join(f.rung for f in FORMS)}")
    rungs = []
    for place, form in enumerate(forms):
        progress(form.rung, place, len(forms))
        if reason := form.unable(export, form.rung in (asked or ())):
            rungs.append(Rung(form.title, "not run", reason, key=form.rung))
            continue
        with form.runner(export, graph) as runner:
            rung = rung_of(form.title, list(alone(judge, runner, step, seed)))
        rung.key = form.rung
        rungs.append(rung)
    progress("block", len(forms), len(forms))
    found = first_fault(export, rungs, {}, seed) if bisect else None
    return Report(rungs, {}, {}, asked=tuple(n for n in RUNGS if n in (asked or ())), bisect=found)
