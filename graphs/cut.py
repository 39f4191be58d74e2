"""Cuts a part out of a finished graph, to run it alone on known inputs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import onnx
from onnx import GraphProto, ModelProto, NodeProto

from llmexport.graphs.bodies import graphs_of, op_of
from llmexport.graphs.lower_add_rms_norm import NORM, SUM
from llmexport.plugins.spec import DOMAIN

# Which output the sum is, of what adds and norms.
SUMS = {(DOMAIN, "AddRmsNorm"): 1, ("com.microsoft", NORM): SUM}


def cut(model: ModelProto, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[str]) -> ModelProto:
    """The part of `model` that makes `outputs` from `inputs`, with the weights and bodies it needs.

    A fused node may straddle the cut: where `inputs` holds the sum that a node of SUMS makes, and the part needs its
    norm, the node stays and is fed zeros and the sum as residual, which is the same norm exactly. Raises
    ValueError if an output depends on an input of the model that `inputs` does not hold.
    """
    graph = model.graph
    makers = makers_of(graph.node)
    initializers = {t.name: t for t in graph.initializer}
    given = {v.name for v in inputs}
    kept: dict[str, list[NodeProto]] = {}
    weights: dict[str, onnx.TensorProto] = {}
    todo = list(outputs)
    while todo:
        name = todo.pop()
        if not name or name in given:
            continue
        if name in initializers:
            weights[name] = initializers[name]
        elif name not in makers:
            raise ValueError(f"the cut needs {name}, which is not among its inputs")
        elif makers[name].output[0] not in kept:
            nodes = _straddling(makers[name], given)
            kept[makers[name].output[0]] = nodes
            made = {n for node in nodes for n in node.output}
            todo.extend(n for node in nodes for n in reads(node) if n not in made)
    part = ModelProto()
    part.CopyFrom(model)
    part.graph.Clear()
    part.graph.name = "cut"
    for node in graph.node:
        part.graph.node.extend(kept.get(node.output[0], ()))
    part.graph.initializer.extend(weights.values())
    part.graph.input.extend(inputs)
    typed = {v.name: v for v in (*graph.value_info, *graph.output)}
    part.graph.output.extend(typed[n] for n in outputs)
    called = {(n.domain, n.op_type) for g in graphs_of(part.graph) for n in g.node}
    bodies = [f for f in model.functions if (f.domain, f.name) in called]
    del part.functions[:]
    part.functions.extend(bodies)
    return part


def reads(node: NodeProto) -> list[str]:
    """The values that a node reads, those that its branches read from outside included."""
    found = [*node.input]
    for branch in (a.g for a in node.attribute if a.HasField("g")):
        own = {n for inner in branch.node for n in inner.output} | {t.name for t in branch.initializer}
        own |= {v.name for v in branch.input}
        found += [n for inner in branch.node for n in reads(inner) if n not in own]
    return found


def readers_of(nodes: Iterable[NodeProto]) -> dict[str, list[NodeProto]]:
    """By value, the nodes that read it, each once for each time."""
    found: dict[str, list[NodeProto]] = defaultdict(list)
    for node in nodes:
        for name in reads(node):
            found[name].append(node)
    return found


def makers_of(nodes: Iterable[NodeProto]) -> dict[str, NodeProto]:
    """By value, the node that makes it."""
    # An output that is left out has the name of an input that is.
    return {name: node for node in nodes for name in node.output if name}


class Values:
    """Who makes and who reads the values of a graph, and which are its `outputs`."""

    def __init__(self, graph: GraphProto) -> None:
        self.outputs = {o.name for o in graph.output}
        self.makers, self.readers = makers_of(graph.node), readers_of(graph.node)

    def only(self, value: str, op_type: str, domain: str = "") -> NodeProto | None:
        """The node of this kind that makes a value, if that is one input of one other node, and nothing else."""
        node = self.makers.get(value)
        known = node is not None and (node.domain, node.op_type) == (domain, op_type)
        return node if known and len(self.readers[value]) == 1 and value not in self.outputs else None


def needed(nodes: Iterable[NodeProto], outputs: Iterable[str]) -> list[NodeProto]:
    """The nodes that `outputs` need, in their order, but each behind those that it reads."""
    every = [*nodes]
    makers = makers_of(every)
    read, waiting = set[str](), [*outputs]
    while waiting:
        name = waiting.pop()
        if name and name not in read:
            read.add(name)
            waiting += reads(makers[name]) if name in makers else ()
    done: dict[int, NodeProto] = {}
    ahead = [n for n in reversed(every) if not read.isdisjoint(n.output)]
    while ahead:
        node = ahead[-1]
        missing = [m for m in map(makers.get, reads(node)) if m is not None and id(m) not in done]
        if missing and id(node) not in done:
            ahead += missing
        else:
            done[id(ahead.pop())] = node
    return [*done.values()]


def _straddling(node: NodeProto, given: set[str]) -> list[NodeProto]:
    """The node itself; or, of one of SUMS whose sum is given, the same norm of that sum and zeros."""
    place = SUMS.get((node.domain, op_of(node)), len(node.output))
    if place >= len(node.output) or node.output[place] not in given:
        return [node]
    total = node.output[place]
    zeros = onnx.helper.make_node("Sub", [total, total], [f"{total}/zeros"], name=f"{total}/zeros")
    norm = NodeProto()
    norm.CopyFrom(node)
    # A norm of x itself leaves zeros as they are.
    norm.input[0], norm.input[1], norm.output[place] = zeros.output[0], total, f"{total}/again"
    if node.domain != DOMAIN:
        # Of a bias, which the sum has.
        del norm.input[3:]
    return [zeros, norm]
