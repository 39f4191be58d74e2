"""Replays a golden pack on whatever runs the graphs of its export, and judges what comes out.

Each step reads what the runner itself made of the steps before, so that an error in one adds up, as in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmexport.export import engine_record
from llmexport.export.errors import EngineError
from llmexport.export.spec import Port, Sizes
from llmexport.validate.compare import Mismatch, compare
from llmexport.validate.metrics import Scores, measure
from llmexport.validate.pack import AGAIN, Arrays, Graph, Pack, Stage, expected_key, fed_key, real_key, widened
from llmexport.validate.report import Rung, rung_of

Run = Callable[[str, Arrays], Arrays]  # a graph by name and its feed -> its outputs; of bfloat16 the bits
Fits = Callable[[str, Arrays], str]  # why a graph does not take a feed, or nothing


@dataclass
class Replay:
    """What came of a pack: the rung, what was left out and why; and if they are kept, outputs by stage, as expected
    and as found."""

    rung: Rung
    left_out: list[str] = field(default_factory=list)
    expected: list[Arrays] = field(default_factory=list)
    found: list[Arrays] = field(default_factory=list)


def check_same(pack: Pack, graphs: Mapping[str, Graph], where: str) -> None:
    """Raise Mismatch unless the pack is of the export whose graphs, in `where`, these are."""
    theirs, remake = pack.header.graphs, f"{AGAIN} with the export of {where}"
    if theirs.keys() != graphs.keys():
        names = [", ".join(g) for g in (theirs, graphs)]
        raise Mismatch(f"{pack.path} is of the graphs {names[0]}, {where} of {names[1]}: {remake}")
    for name, graph in graphs.items():
        if theirs[name].model_sha256 != graph.model_sha256:
            shown = f"{theirs[name].model_sha256[:12]}, not {graph.model_sha256[:12]}"
            raise Mismatch(f"{pack.path} is of another model than {where} (digest of {name}.onnx {shown}): {remake}")
        for mine, other in ((graph.inputs, theirs[name].inputs), (graph.outputs, theirs[name].outputs)):
            if odd := sorted(_said(mine) ^ _said(other)):
                raise Mismatch(f"{pack.path} and {where} have other ports, as {odd[0]}: {remake}")


def _said(ports: tuple[Port, ...]) -> set[str]:
    return {f"{p.name} {p.dtype} {list(p.shape)}" for p in ports}


def outside(inputs: tuple[Port, ...], profile: Mapping[str, Sizes], feed: Arrays) -> str:
    """Why an engine of this profile does not take a feed, or nothing."""
    pairs = (pair for port in inputs for pair in zip(map(str, port.shape), feed[port.name].shape, strict=True))
    return engine_record.outside(profile, pairs)


def replay(pack: Pack, title: str, run: Run, fits: Fits = lambda graph, feed: "", *, keep: bool = False) -> Replay:
    """The rung of a runner on all stages of a pack but crossings that it does not take, which the note names.

    Raises EngineError if it does not take the prompt or what follows it, Mismatch if it gives other names or shapes.
    """
    done = Replay(Rung(title, "not run"))
    details: list[dict[str, Any]] = []
    scores: list[Scores] = []
    for i, stage, made in _stages(pack, run, fits, done.left_out):
        expected: Arrays = {}
        for output, allowed in stage.allowed.items():
            expected[output] = pack.array(expected_key(i, output))
            real = None if output in stage.whole else pack.array(real_key(i))
            difference = compare(expected[output], made[output], real, allowed.strays)
            details.append({"step": stage.name, "output": output, "difference": difference, "allowed": allowed})
            if output == stage.logits:
                every = np.ones(expected[output].shape[:2], bool) if real is None else real
                scores.append(Scores(stage.name, expected[output], made[output], every, stage.greedy))
        if keep:
            done.expected.append(expected)
            done.found.append(made)
    done.rung = rung_of(title, details)
    done.rung.metrics = measure(scores)
    said = [f"not run, as it is outside of the profile: {n}" for n in done.left_out]
    said += [f"left out of the pack: {', '.join(pack.header.left_out)}"] if pack.header.left_out else []
    done.rung.note = "; ".join(filter(None, [done.rung.note, *said]))
    return done


def _stages(pack: Pack, run: Run, fits: Fits, left_out: list[str]) -> Iterator[tuple[int, Stage, Arrays]]:
    """Each stage that is run, with its place in the pack and its outputs that are compared."""
    carried: dict[str, Arrays] = {}
    held: Arrays = {}
    for i, stage in enumerate(pack.header.stages):
        made = Arrays()
        for shot in stage.shots:
            graph = pack.header.graphs[shot.graph]
            fed = {port: pack.array(fed_key(i, shot.graph, port)) for port in shot.fed}
            known = held | carried.get(shot.graph, {}) | fed
            if lost := next((p.name for p in graph.inputs if p.name not in known), ""):
                raise Mismatch(f"{pack.path} says nothing of {lost} in {stage.name}: {AGAIN}")
            feed = {p.name: known[p.name] for p in graph.inputs}
            if reason := fits(shot.graph, feed):
                if stage.kind != "crossing":
                    cure = "make a pack with fewer --tokens, or build with a wider --profile"
                    raise EngineError(f"{pack.path}, {stage.name}: {reason}: {cure}")
                left_out.append(f"{stage.name} ({reason})")
                break
            outputs = run(shot.graph, feed)
            carried[shot.graph] = {before: outputs[after] for before, after in graph.carried.items()}
            held |= fed | outputs
            made |= {p.name: widened(outputs[p.name], p.dtype) for p in graph.outputs if p.name in stage.allowed}
        else:
            yield i, stage, made
