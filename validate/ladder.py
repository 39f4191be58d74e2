"""The ladder: every rung from the published model to what is deployed, each with its error against the last."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from llmexport.export.errors import EngineError, ExportError
from llmexport.export.exported import Export
from llmexport.export.progress import Progress, silent
from llmexport.export.values import one_line
from llmexport.plugins.errors import PluginError
from llmexport.validate import drive, overflow, stages
from llmexport.validate.bisect import first_fault, or_stopped, with_blocks
from llmexport.validate.drive import TorchDriver, beyond, in_torch, record
from llmexport.validate.feeds import Feed
from llmexport.validate.forms import FORMS
from llmexport.validate.judge import Judge, alone, rung_of
from llmexport.validate.report import Report, Rung
from llmexport.validate.stages import Script
from llmexport.validate.thresholds import BEFORE
from llmexport.validate.unquantised import moved, unquantised
from llmexport.validate.whole import BLOCKS, Whole

Keep = Callable[[Mapping[str, list[Feed]]], None]
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
    reference: Path | None = None,
    keep: Keep | None = None,
    progress: Progress = silent,
) -> Report:
    """Runs the rungs of these names, or every rung that this machine can run, and says of each other one why not.

    bisect: what fails is traced to its block and node, for which the blocks are run too. reference: the folder of the
    checkpoint that this one was quantised from. keep: gets the outputs of each
    stage of a whole model, by runner. Raises Mismatch if two runs have different shapes, ExportError if there is no
    rung of a name, or no node of this type can be run.
    """
    asked = check_rungs(rungs)
    wide = unquantised(export, reference) if reference else None
    if bisect:
        asked = with_blocks(export, asked)
    with in_torch(export) as ours, exact_driver(export) as exact:
        if export.block is not None:
            return _climb_block(export, asked, ours, exact, seed, bisect, progress)
        prompt = stages.prompt(export, tokens=tokens, seed=seed)
        return _climb_whole(export, asked, ours, exact, prompt, bisect, wide, keep, progress)


@contextlib.contextmanager
def exact_driver(export: Export) -> Iterator[TorchDriver | None]:
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
    wide: Export | None,
    keep: Keep | None,
    progress: Progress,
) -> Report:
    names = [n for n in RUNGS if asked is None or n in asked]
    progress("PyTorch", 0, 1 + len(names))
    script, ours, recorded = record(torch, prompt)
    whole = Whole(export, script, torch, exact_torch, ours, recorded, asked or frozenset())
    rungs: list[Rung] = []
    for place, name in enumerate(names):
        progress(_doing(name, asked), 1 + place, 1 + len(names))
        rungs += _called(whole.rungs, name, bisect)
    apart = next((r for r in rungs if r.name == BLOCKS), None)
    # A model that is not finite in fp32 either does not overflow.
    lost = export.dtype if whole.exact and whole.exact.finite else "float32"
    overflow.explain(rungs, lost, ours.overflows or (overflow.first_alone(apart) if apart else None))
    progress("done", 1 + len(names), 1 + len(names))
    _note_uncrossed(rungs, export, beyond(export, prompt)[1])
    if keep:
        keep({name: run.outputs for name, run in whole.runs.items()})
    runs = {"PyTorch": ours} | {n: run for n, run in whole.forms.items() if run.prompts}
    return Report(
        rungs,
        {n: run.medians for n, run in runs.items()},
        _shape(script),
        asked=_in_order(asked),
        calls={n: run.calls for n, run in runs.items()},
        bisect=first_fault(export, rungs, recorded) if bisect else None,
        largest=ours.largest,
        warning=overflow.near(ours.largest) if lost == "float16" else "",
        moved=moved(export, wide, script, ours) if wide else None,
    )


def _called(run: Callable[[str], list[Rung]], name: str, bisect: bool) -> list[Rung]:
    """What a rung gives, under the name that users choose it by."""
    rungs = or_stopped(run, name, bisect)
    for rung in rungs:
        rung.key = name
    return rungs


def _in_order(asked: frozenset[str] | None) -> tuple[str, ...]:
    return tuple(n for n in RUNGS if n in (asked or ()))


def _doing(name: str, asked: frozenset[str] | None) -> str:
    form = next((f for f in FORMS if asked and f.rung == name), None)
    return (form and form.doing()) or name


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
    crossed = [s.past + BEFORE for s in script if s.kind == "crossing"]
    decodes = sum(s.kind == "decode" for s in script)
    shown = {"pictures": len(script[0].pictures)} if script[0].pictures else {}
    return {"batch": batch, "tokens": tokens, **shown, "decode_steps": decodes, "crossed": crossed}


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
    forms = {f.rung: f for f in FORMS if asked is None or f.rung in asked}
    if asked and asked != forms.keys():
        raise ExportError(f"{export.folder} is one block, whose rungs are {', '.join(f.rung for f in FORMS)}")

    def climbed(name: str) -> list[Rung]:
        form = forms[name]
        if reason := form.unable(export, asked is not None):
            return [Rung(form.title(), "not run", reason)]
        try:
            with form.runner(export, graph) as runner:
                rung = rung_of(form.title(), list(alone(judge, runner, step, seed)))
            rung.note = "; ".join(filter(None, (rung.note, form.note(export))))
        except (EngineError, PluginError) as error:
            rung = Rung(form.title(), "fail", one_line(error))
        return [rung]

    rungs: list[Rung] = []
    for place, name in enumerate(forms):
        progress(name, place, len(forms))
        rungs += _called(climbed, name, bisect)
    progress("block", len(forms), len(forms))
    found = first_fault(export, rungs, {}, seed) if bisect else None
    return Report(rungs, {}, {}, asked=_in_order(asked), bisect=found)
