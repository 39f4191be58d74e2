"""The first block, then the first node in it, whose output leaves tolerance: `validate --bisect`.

A block is one of the rung over blocks. Its nodes are run one by one, each on what the block computes as it is traced
afresh, before any pass, so that the node that is wrong is named and none of those that read it. A fused node is held
to the values of the nodes whose place it took.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import onnx

from llmexport.export import graph_file
from llmexport.export.errors import ExportError
from llmexport.export.exported import Export, ExportedGraph
from llmexport.export.spec import Step
from llmexport.export.static import kind_of
from llmexport.export.values import one_line
from llmexport.validate import bound, nodes
from llmexport.validate.drive import Recorded
from llmexport.validate.feeds import Feed
from llmexport.validate.judge import feeds_alone
from llmexport.validate.report import Bisection, Node, Rung
from llmexport.validate.runners import not_runnable
from llmexport.validate.runtime import STOPPED, open_session

NODES = ("blocks", "onnxruntime")  # the rungs that run the nodes of the file
SAME = "an export makes the same node: a pass, the body of an op or ONNX Runtime computes otherwise than the trace"
NONE = "no node of it: they compute what a fresh trace does, which is not what PyTorch does"
APART = "none: each gives in ONNX Runtime what PyTorch does on the same inputs"


def with_blocks(export: Export, asked: frozenset[str] | None) -> frozenset[str] | None:
    """The rungs that are asked for, and the one over blocks. Raises ExportError if no node of the type can be run."""
    if reason := not_runnable(export.dtype):
        raise ExportError(
            f"--bisect runs nodes one by one, and {reason.partition(':')[0]}: bisect a float32 or float16 export"
        )
    return asked and asked | {"blocks" if export.block is None else "onnxruntime"}


def or_stopped(run: Callable[[str], list[Rung]], name: str, bisect: bool) -> list[Rung]:
    """What the rung of that name gives. If ONNX Runtime stops in it, it fails for who asks where."""
    try:
        return run(name)
    except STOPPED as error:
        if not bisect:
            raise
        return [Rung(name, "fail", one_line(error))]


def first_fault(export: Export, rungs: Sequence[Rung], recorded: Recorded, seed: int = 0) -> Bisection:
    """What the rungs found, traced to its block and its node.

    recorded: what our PyTorch computed in the runs of the rung over blocks. seed: of the inputs drawn for its others.
    """
    models, checkpoint = {g.name: graph_file.load(export, g) for g in export.graphs}, export.checkpoint()
    wrong = {g.name: bound.wrong(export, g, models[g.name]) for g in export.graphs}
    weights = [
        f"{export.place(g.name, bound.reader(g, checkpoint, tensor))}: {tensor} {said}"
        for g in export.graphs
        for tensor, said in wrong[g.name].items()
    ]
    failed = [r for r in rungs if r.status == "fail"]
    blamed = next((r for r in failed if r.key in NODES and any(map(_is_over, r.details))), None)
    block = next(filter(_is_over, blamed.details)) if blamed else None
    if stopped := [r for r in failed if r.key in NODES and not r.details]:
        block = block or _first_stopped(export, models, recorded, seed)
    others = {r.name: r.note for r in failed if not block or (r is not blamed and r not in stopped)}
    if block is None:
        return Bisection(None, None, APART if failed else "", tuple(weights), others)
    steps = {export.place(g.name, s.name): (g, s) for g in export.graphs for s in g.assembly.steps}
    graph, step = steps[block["step"]]
    feed = next(f for run, f in _feeds(export, graph, step, recorded, seed) if run == block["run"])
    node = first_node(export, graph, step, models[graph.name], feed, wrong[graph.name])
    said = "; ".join([NONE, *([blamed.note] if blamed and blamed.note else [])])
    return Bisection(block, node, "" if node else said, tuple(weights), others)


def first_node(
    export: Export, graph: ExportedGraph, step: Step, model: onnx.ModelProto, feed: Feed, wrong: Collection[str]
) -> Node | None:
    """The first node of a step that leaves tolerance on what the trace computes from `feed`; if none does, the one
    that is furthest off; None if all give the very numbers of the trace.

    model: the graph's file. wrong: the tensors in it that are not the checkpoint's.
    """
    checkpoint = export.checkpoint()
    own = bound.parameters(graph, model, checkpoint)
    traced = graph_file.as_traced(step, own[step.name], checkpoint, export.dtype, graph.assembly.opset)
    part = graph_file.cut_step(model, step, export.dtype)
    outputs = list(nodes.run_alone(part, traced, feed, export.folder))
    over = [o for o in outputs if o.excess > 1]
    found = over[0] if over else max(outputs, key=lambda o: o.excess)
    if not found.excess:
        return None
    _, data = graph_file.build(graph, own, checkpoint, export.dtype, export.target, kind_of(graph.ops))
    made = onnx.ModelProto.FromString(data)
    told = [found.said] if found.said else []
    told += nodes.changes(found.node.name, model, made)
    told += [f"it reads {n}, which is not the checkpoint's" for n in found.node.input if n in wrong]
    name, op, said = found.node.name, nodes.op_of(found.node), "; ".join(told) or SAME
    return Node(name, op, found.name, found.difference, found.allowed, bool(over), said)


def _is_over(detail: Mapping[str, Any]) -> bool:
    """Whether it is a block, and beyond its tolerance."""
    return isinstance(detail["step"], str) and detail["difference"].excess(detail["allowed"]) > 1


def _feeds(
    export: Export, graph: ExportedGraph, step: Step, recorded: Recorded, seed: int
) -> Iterator[tuple[str, Feed]]:
    """What a step is run on in the rung over blocks, by run."""
    for run, values in recorded.items():
        if made := values.get(graph.name):
            yield run, {n: made[n] for n in step.inputs}
    if not recorded or not graph.step_weights[step.name]:
        yield from feeds_alone(step, export.dtype, seed)


def _first_stopped(
    export: Export, models: Mapping[str, onnx.ModelProto], recorded: Recorded, seed: int
) -> dict[str, Any] | None:
    """The first step that ONNX Runtime does not take or stops in, as a detail of the rung over blocks."""
    for graph, step in ((g, s) for g in export.graphs for s in g.assembly.steps):
        part = graph_file.cut_step(models[graph.name], step, export.dtype)
        for run, feed in _feeds(export, graph, step, recorded, seed):
            try:
                open_session(part, export.folder).run(None, feed)
            except STOPPED:
                where = {"step": export.place(graph.name, step.name), "kind": step.block.kind, "run": run}
                return {**where, "output": step.outputs[0], "difference": None, "allowed": None}
    return None
