"""The first block, then the first node in it, whose output leaves tolerance: `validate --bisect`.

A block is one of the rung over blocks. Its nodes are run one by one, each on what the block computes as it is traced
afresh, before any pass, so that the node that is wrong is named and none of those that read it. A fused node is held
to the values of the nodes whose place it took.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx

from llmexport.export import graph_file
from llmexport.export.errors import ExportError
from llmexport.export.exported import Export, ExportedGraph
from llmexport.export.spec import Step
from llmexport.validate import bound, nodes
from llmexport.validate.drive import Recorded
from llmexport.validate.feeds import Feed
from llmexport.validate.judge import feeds_alone
from llmexport.validate.report import Bisection, Node, Rung
from llmexport.validate.runners import not_runnable

SAME = "an export makes the same node: a pass, the body of an op or ONNX Runtime computes otherwise than the trace"
NONE = "no node of it: they compute what a fresh trace does, which is not what PyTorch does"
BETWEEN = "none: each gives what PyTorch does on the same inputs, what is off adds up or lies between them"


def check_runs(export: Export) -> None:
    """Raise ExportError on an export whose nodes cannot be run here."""
    if reason := not_runnable(export.dtype):
        raise ExportError(
            f"--bisect runs nodes one by one, and {reason.partition(':')[0]}: bisect a float32 or float16 export"
        )


def first_fault(export: Export, rungs: Sequence[Rung], recorded: Recorded, seed: int = 0) -> Bisection:
    """What the rungs found, traced to its block and its node.

    recorded: what our PyTorch computed in the runs of the rung over blocks. seed: of the inputs drawn for its others.
    """
    models = {g.name: graph_file.load(export, g) for g in export.graphs}
    weights = [
        f"{export.place(g.name, step)}: {said}"
        for g in export.graphs
        for step, lines in bound.wrong(export, g, models[g.name]).items()
        for said in lines
    ]
    failed = [r for r in rungs if r.status == "fail"]
    over = next(((r, d) for r in failed for d in r.details if _by_block(r, d)), None)
    others = {r.name: r.note for r in failed if over is None or r is not over[0]}
    if over is None:
        return Bisection(None, None, BETWEEN if failed else "", tuple(weights), others)
    detail = over[1]
    graph, step = next(
        (g, s) for g in export.graphs for s in g.assembly.steps if export.place(g.name, s.name) == detail["step"]
    )
    feed = _feed(export, graph, step, str(detail["run"]), recorded, seed)
    node = first_node(export, graph, step, models[graph.name], feed)
    return Bisection(detail, node, "" if node else NONE, tuple(weights), others)


def first_node(export: Export, graph: ExportedGraph, step: Step, model: onnx.ModelProto, feed: Feed) -> Node | None:
    """The first node of a step that leaves tolerance on what the trace computes from `feed`; if none does, the one
    that is furthest off; None if all give the very numbers of the trace. `model` is the graph's file."""
    checkpoint, own = export.checkpoint(), bound.parameters(graph, model)
    traced = graph_file.as_traced(step, own[step.name], checkpoint, export.dtype, graph.assembly.opset)
    expected = feed | nodes.values(traced, feed, export.folder)
    part = graph_file.cut_step(model, step, export.dtype)
    outputs = list(nodes.run_alone(part, expected, export.folder))
    over = [o for o in outputs if o.excess > 1]
    found = over[0] if over else max(outputs, key=lambda o: o.excess)
    if not found.excess:
        return None
    _, data = graph_file.build(graph, own, checkpoint, export.dtype, export.target)
    made = onnx.ModelProto.FromString(data)
    changes = nodes.changes(found.node.name, model, made)
    said = [*([found.said] if found.said else []), *(changes or [SAME])]
    return Node(
        found.node.name,
        nodes.op_of(found.node),
        found.name,
        found.difference,
        found.allowed,
        bool(over),
        "; ".join(said),
    )


def _by_block(rung: Rung, detail: Mapping[str, Any]) -> bool:
    """Whether it is a block in ONNX Runtime, and beyond its tolerance."""
    runs_nodes = rung.key in ("blocks", "onnxruntime") and isinstance(detail["step"], str)
    return runs_nodes and detail["difference"].excess(detail["allowed"]) > 1


def _feed(export: Export, graph: ExportedGraph, step: Step, run: str, recorded: Recorded, seed: int) -> Feed:
    """What the block read in that run."""
    if run in recorded:
        return {n: recorded[run][graph.name][n] for n in step.inputs}
    return dict(feeds_alone(step, export.dtype, seed))[run]
