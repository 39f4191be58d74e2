"""A whole model on its rungs: against transformers, block by block, and in each form that it is run in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from llmexport.export import graph_file
from llmexport.export.errors import EngineError
from llmexport.export.exported import Export
from llmexport.export.values import one_line
from llmexport.plugins.errors import PluginError
from llmexport.validate import references
from llmexport.validate.drive import Recorded, Run, Runs, TorchDriver, driver, follow
from llmexport.validate.feeds import Feed
from llmexport.validate.forms import FORMS, Form
from llmexport.validate.judge import Judge, alone, compare_runs, rung_of
from llmexport.validate.loading import Refused
from llmexport.validate.pictures import sight
from llmexport.validate.reference import Transformers
from llmexport.validate.report import REFERENCE, Rung
from llmexport.validate.runners import not_runnable, onnx_runner
from llmexport.validate.stages import Script, Stage
from llmexport.validate.tolerance import tolerances

BLOCKS = "blocks: ONNX Runtime / PyTorch"


class Taking:
    """A model that is run on the stages it takes, and gives nothing for the others, which must be crossings."""

    def __init__(self, model: Runs, takes: Callable[[Stage], bool]) -> None:
        self.seconds = 0.0
        self._model, self._takes = model, takes

    def run(self, stage: Stage) -> Feed:
        if not self._takes(stage):
            return Feed()
        outputs = self._model.run(stage)
        self.seconds = self._model.seconds
        return outputs


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

    @property
    def runs(self) -> dict[str, Run]:
        """All of them, by the name of the runner."""
        exact = {"PyTorch, float32": self.exact} if self.exact else {}
        theirs = {"transformers": self.theirs[0]} if self.theirs else {}
        return {**theirs, **exact, "PyTorch": self.ours, **self.forms}

    def rungs(self, name: str) -> list[Rung]:
        if name == "transformers":
            return self._references()
        if name == "blocks":
            return [self._blocks()]
        return [self._form(next(f for f in FORMS if f.rung == name))]

    def _form(self, form: Form) -> Rung:
        """A form on the script: in fp32 against the form that it follows, in 16 bits as far from fp32 as right runs
        are."""
        before = form.against if form.against and not form.against.unable(self.export, True) else None
        title = form.title(None if self.exact_torch else before)
        if reason := form.unable(self.export, form.rung in self.asked):
            return Rung(title, "not run", reason)
        left = self._left(form)
        # Crossings may be left out; the prompt and what follows it hang together.
        if needed := next((f"{s.name}: {why}" for s, why in left if s.kind != "crossing"), ""):
            return Rung(title, "not run", needed)
        try:
            found = self._run(form, left)
        except (EngineError, PluginError) as error:
            return Rung(title, "fail", one_line(error))
        other = self._run(before, self._left(before)) if before else None
        yardsticks = [self.ours, *self.theirs, *([other] if other else [])] if self.exact else []
        expected = self.exact or other or self.ours
        allowed = tolerances(self.export.dtype, self.export)
        rung = compare_runs(title, self.script, expected, found, allowed, yardsticks)
        lacks = [f"not run {s.name}, as {why}" for s, why in left]
        place = self._traced(form) if rung.status == "fail" else ""
        rung.note = "; ".join(filter(None, (rung.note, *lacks, place, form.note(self.export))))
        return rung

    def _left(self, form: Form) -> list[tuple[Stage, str]]:
        """The stages that a form does not take, and why."""
        seen = sight(self.export.blocks)
        sizes = [s.sizes | (seen.sizes(s.pictures) if seen else {}) for s in self.script]
        return [(s, why) for s, own in zip(self.script, sizes, strict=True) if (why := form.outside(self.export, own))]

    def _traced(self, form: Form) -> str:
        """Where its numbers part, or why nobody can tell."""
        try:
            return form.trace(self.export, self.recorded)
        except (EngineError, PluginError) as error:
            return one_line(error)

    def _run(self, form: Form, left: Sequence[tuple[Stage, str]]) -> Run:
        """The run of a form, of the stages that are not `left`."""
        if form.name not in self.forms:
            with driver(self.export, lambda graph: form.runner(self.export, graph)) as model:
                taking = Taking(model, lambda stage: all(stage is not s for s, _ in left))
                self.forms[form.name] = follow(taking, self.export, self.script, timed=form.timed)
        return self.forms[form.name]

    def _references(self) -> list[Rung]:
        """Our PyTorch against transformers, which carries its own cache.

        In 16 bits transformers in fp32 is the reference, and transformers in 16 bits says how far from it is right.
        What our PyTorch makes of the model in fp32 is a rung of its own: roundoff can hide a wrong model.
        """
        export, script = self.export, self.script
        names = [REFERENCE] if self.exact is None else [REFERENCE, f"{REFERENCE}, float32"]
        allowed = tolerances(export.dtype, export)
        try:
            reference = follow(Transformers(export), export, script)
            self.theirs.append(reference)
            if self.exact is None:
                return self._told(compare_runs(REFERENCE, script, reference, self.ours, allowed))
            wide = follow(Transformers(export.in_float32()), export, script)
        except Refused as refusal:
            return [Rung(n, "not run", str(refusal)) for n in names]
        return self._told(
            compare_runs(names[0], script, wide, self.ours, allowed, [reference]),
            compare_runs(names[1], script, wide, self.exact, tolerances("float32", export)),
        )

    def _told(self, *rungs: Rung) -> list[Rung]:
        """The rungs, each with what the reference is where transformers has no class of this layout."""
        source = references.source(self.export.reference.made_by)
        for rung in rungs if source else ():
            rung.note = "; ".join(filter(None, (rung.note, f"reference: {source}")))
        return [*rungs]

    def _blocks(self) -> Rung:
        """Every step of the exported files alone, fed what PyTorch computed before it, so that no error adds up.

        Steps without weights (masks, angles, temperatures) are run across their thresholds as well, however far those
        are.
        """
        export = self.export
        if reason := not_runnable(export.dtype):
            return Rung(BLOCKS, "not run", reason)
        models = {g.name: graph_file.load(export, g) for g in export.graphs}
        details: list[dict[str, Any]] = []
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
