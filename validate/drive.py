"""Runs an export through a script of stages, on one runner for each of its graphs, in order.

A graph with states is stepped by what it carries. One without is run at every stage whose tokens it reads; one that
reads none of them is run once for a prompt, and its outputs are held by name for the graphs after it. One that looks at
pictures is run where a stage has any, and its features are for that stage alone.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from polygraphy.backend.base import BaseRunner

from llmexport.export.exported import Export, ExportedGraph
from llmexport.export.spec import BATCH, PAST, Port
from llmexport.validate import overflow
from llmexport.validate.compare import Mismatch
from llmexport.validate.feeds import Feed, beside, draw, holds_tokens, shape_of, states, without_pictures, words
from llmexport.validate.pictures import sight
from llmexport.validate.runners import TorchRunner
from llmexport.validate.stages import (
    DECODE_STEPS,
    PIECE,
    Script,
    Stage,
    crossing,
    one_picture,
    padded_right,
    runs_at,
    unpadded,
)
from llmexport.validate.thresholds import suspected_thresholds, thresholds

BY_PADDING = {"lower_static_attention", "lower_sink_attention"}  # after which a graph does otherwise without padding
MOST_PAST = 4 * 2**30  # bytes of a random past in fp32, which is held for each step across a threshold
# A prompt is timed again until there are so many calls, or the fewer that make a median took so long.
WARM_CALLS, LEAST_CALLS, WARM_SECONDS = 5, 3, 0.2
R = TypeVar("R", bound=BaseRunner)
Recorded = dict[str, dict[str, Feed]]  # name of a stage -> graph -> value


class Runs(Protocol):
    """Whatever runs a model stage by stage, carrying what a stage leaves to the next; `seconds` is of the last one."""

    seconds: float

    def run(self, stage: Stage) -> Feed: ...


class Driver(Generic[R]):
    """An export on runners that are active, by the graph that each runs."""

    def __init__(self, export: Export, runners: Mapping[str, R]) -> None:
        self.export = export
        self.runners = runners
        self.seconds = 0.0
        self.ran: tuple[str, ...] = ()  # the graphs that the last stage was run on
        self._carried: dict[str, Feed] = {}  # what each graph reads at the next stage
        self._held: Feed = {}  # what later graphs read, and what was drawn for this prompt

    def run(self, stage: Stage) -> Feed:
        """The outputs of the graphs that it is run on, by value name, but for what a crossing would carry on.

        Raises Mismatch beyond the last slot of a static cache.
        """
        export, made = self.export, Feed()
        slots, tokens = export.max_tokens, stage.mask.shape[1]
        if slots and tokens > slots:
            raise Mismatch(
                f"{stage.name} ends at token {tokens}, the static cache has {slots}: export with --max-tokens {tokens}"
            )
        if stage.begins:
            self._held = draw(beside(export), export.blocks, export.dtype, stage.sizes)
            self._carried = {g.name: states(g, export.dtype, stage.sizes) for g in export.graphs}
        self._held |= without_pictures(export)
        graphs = [g for g in export.graphs if runs_at(stage, g)]
        self.seconds, self.ran = 0.0, tuple(g.name for g in graphs)
        for graph in graphs:
            runner, carried = self.runners[graph.name], self._carried.pop(graph.name)
            others = (p for p in graph.assembly.inputs if p.name not in carried)
            outputs = runner.infer(carried | {p.name: self._fed(p, stage) for p in others}, check_inputs=False)
            self.seconds += runner.last_inference_time()
            ends = set(graph.carried.values()) if stage.kind == "crossing" else set()
            kept = {n: np.copy(a) for n, a in outputs.items() if n not in ends}
            if not ends:
                self._carried[graph.name] = {before: kept[after] for before, after in graph.carried.items()}
            self._held |= {n: a for n, a in kept.items() if n not in graph.carried.values()}
            made |= kept
        return made

    def _fed(self, port: Port, stage: Stage) -> np.ndarray:
        """What an earlier graph made, or was drawn for this prompt; else what the stage says of its tokens."""
        return self._held[port.name] if port.name in self._held else stage.at(port)


TorchDriver = Driver[TorchRunner]


@contextlib.contextmanager
def driver(export: Export, make: Callable[[ExportedGraph], R]) -> Iterator[Driver[R]]:
    """A driver on the runners that `make` gives, active as long as it is used."""
    with contextlib.ExitStack() as stack:
        yield Driver(export, {g.name: stack.enter_context(make(g)) for g in export.graphs})


def in_torch(export: Export) -> contextlib.AbstractContextManager[TorchDriver]:
    """A driver on our PyTorch."""
    return driver(export, lambda graph: TorchRunner(export, graph))


@dataclass
class Run:
    """What one runner made of a script: the outputs of each stage, and seconds.

    carried: the outputs that are states; of those, the ones of pieces alone are kept. prompts: the seconds of calls of
    the first stage once all stages have been run. decodes: those of each decode step. logits: the output that tokens
    are chosen by, if there is one.
    """

    carried: frozenset[str]
    outputs: list[Feed] = field(default_factory=list)
    prompts: list[float] = field(default_factory=list)
    decodes: list[float] = field(default_factory=list)
    overflows: str | None = None  # the first step that made a number that is not finite
    largest: dict[str, float] = field(default_factory=dict)  # of float16, the largest magnitude that each step made
    logits: str | None = None

    @property
    def finite(self) -> bool:
        return all(np.isfinite(a).all() for outputs in self.outputs for a in outputs.values())

    @property
    def medians(self) -> dict[str, float]:
        return {name: statistics.median(seconds) for name, seconds in self._timed.items()}

    @property
    def calls(self) -> dict[str, int]:
        """Of how many calls each median is."""
        return {name: len(seconds) for name, seconds in self._timed.items()}

    @property
    def _timed(self) -> dict[str, list[float]]:
        # A model without decode steps has no time of them.
        return {n: s for n, s in (("prefill", self.prompts), ("decode", self.decodes)) if s}


def record(model: Driver[Any], prompt: Stage) -> tuple[Script, Run, Recorded]:
    """A script, its run, and all values of its stages but decode steps, whose tokens our PyTorch chooses.

    A model that carries something is run on the prompt, DECODE_STEPS greedy tokens, a piece of PIECE tokens at once, a
    prompt without padding if its graph then takes another branch, and across thresholds; any other on the prompt with
    padding on the left, and on the right, or on its pictures and on one alone.
    """
    export, script = model.export, list[Stage]()
    run, recorded = _begun(export), Recorded()

    def take(stage: Stage) -> Feed:
        script.append(stage)
        outputs = _take(model, stage, run)
        values = {name: model.runners[name].values for name in model.ran}
        for graph in export.graphs if not run.overflows else ():
            if graph.name in values and (step := overflow.first_step(graph.assembly, values[graph.name])):
                run.overflows = export.place(graph.name, step)
                break
        for graph in export.graphs if export.dtype == "float16" else ():
            for step, size in overflow.largest(graph.assembly, values.get(graph.name, {})).items():
                place = export.place(graph.name, step)
                run.largest[place] = max(size, run.largest.get(place, 0.0))
        if stage.kind != "decode":
            recorded[stage.name] = values
        return outputs

    outputs, stage = take(prompt), prompt
    if any(g.carried for g in export.graphs):
        # No picture follows a token that the model chooses.
        scores, text = logits(export), words(export.blocks)
        assert scores
        for i in range(DECODE_STEPS):
            stage = stage.then(f"decode {i + 1}", "decode", text[outputs[scores][:, -1:, text].argmax(-1)])
            outputs = take(stage)
        take(stage.then("last", "piece", prompt.ids[:, :PIECE]))
        if any(g.fusions[p].count for g in export.graphs for p in BY_PADDING & g.fusions.keys()):
            take(unpadded(export, prompt))
        for at in beyond(export, prompt)[0]:
            take(crossing(export, at))
    else:
        seen = sight(export.blocks)
        take(one_picture(seen, prompt.pictures) if seen and prompt.pictures else padded_right(prompt))
    run.prompts = time_again(model, prompt)
    return tuple(script), run, recorded


def follow(model: Runs, export: Export, script: Script, *, timed: bool = False) -> Run:
    """The same tokens, but with the runner's own states, so that an error in one adds up."""
    run = _begun(export)
    for stage in script:
        _take(model, stage, run)
    run.prompts = time_again(model, script[0]) if timed else []
    return run


def _begun(export: Export) -> Run:
    return Run(frozenset(n for g in export.graphs for n in g.carried.values()), logits=logits(export))


def logits(export: Export) -> str | None:
    """The output that tokens are chosen by, if there is one."""
    return next((p.name for g in export.graphs for p in g.assembly.outputs if p.use == "logits"), None)


def _take(model: Runs, stage: Stage, run: Run) -> Feed:
    """The outputs of a stage, which its run is told of."""
    outputs = model.run(stage)
    run.outputs.append({n: a for n, a in outputs.items() if n not in run.carried or stage.kind == "piece"})
    if stage.kind == "decode":
        run.decodes.append(model.seconds)
    return outputs


def time_again(model: Runs, prompt: Stage) -> list[float]:
    """The seconds of further calls of a prompt that has been run: a first one also loads weights and picks kernels."""
    seconds: list[float] = []
    while len(seconds) < LEAST_CALLS or (len(seconds) < WARM_CALLS and sum(seconds) < WARM_SECONDS):
        model.run(prompt)
        seconds.append(model.seconds)
    return seconds


def beyond(export: Export, prompt: Stage) -> tuple[list[int], list[int]]:
    """The thresholds that the prompt does not pass: those to cross after a random past, and those too far for it."""
    known = thresholds(export) | suspected_thresholds(export.text_config)
    # No token is beyond a static cache.
    end = export.max_tokens or max(known, default=0) + 1
    far = sorted(t for t in known if prompt.ids.shape[1] <= t < end)
    # Without states there is no past to draw.
    near = [t for t in far if 0 < past_bytes(export, t) <= MOST_PAST]
    return near, far[len(near) :]


def past_bytes(export: Export, tokens: int) -> int:
    """What the caches of one row take after that many tokens, in fp32."""
    sizes = {BATCH: 1, PAST: tokens}
    ports = [p for g in export.graphs for p in g.assembly.inputs]
    return sum(4 * math.prod(shape_of(p, sizes)) for p in ports if holds_tokens(p))
