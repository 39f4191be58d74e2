"""One plugin in place of MoeExperts, what a shared expert adds to it, and the norm that reads their sum."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto, numpy_helper
from onnx.helper import make_attribute, make_node

from llmexport.graphs.cut import Values, reads
from llmexport.plugins.normed import ADDENDS, EXPERTS, GATE_COLUMN, NORM, OWN
from llmexport.plugins.spec import DOMAIN


def join_norms(model: ModelProto, nodes: dict[str, str], served: frozenset[str]) -> dict[str, str]:
    """Joins in place what the plugins in `served` compute at once; returns the nodes that are left to plugins, name ->
    op or such a plugin, of which `nodes` are before.

          x, ...          gate
            |              |
        MoeExperts   [Sigmoid]   shared                 x, ..., residual, weight, [shared, [gate]]
            |              \\      |                                     |
            |               \\    [Mul]         =>             Normed..MoeExperts
            |                \\   /                                  /        \\
            +----- [Add] ----- +                                  y          sum
                     |
          AddRmsNorm of it, a residual and a weight
                 /     \\
                y      sum

    The last kernel of MoeExperts has a token's whole row, and norms it. A node takes the name of MoeExperts. Legal if
    1. what MoeExperts makes, Add, Mul and Sigmoid is read by the next of them alone, and is no output;
    2. AddRmsNorm has no norm of what it adds;
    3. what is added is known to be of the shape of what MoeExperts makes, and a gate to be a number a token.
    Where a Sigmoid or a Mul is read elsewhere, what it makes is a shared expert's result, or a gate is none.
    """
    graph, left = _Graph(model.graph), dict(nodes)
    for norm in model.graph.node:
        # A fourth input is the weight of a norm of what is added.
        if (norm.domain, norm.op_type) != (DOMAIN, NORM) or len(norm.input) > 3:
            continue
        sums = ((residual, s) for value, residual in _both_ways(norm) for s in graph.sums(value))
        for residual, found in itertools.islice((s for s in sums if s[1].plugin in served), 1):
            graph.join(norm, residual, found)
            del left[norm.name]
            left[found.experts.name] = found.plugin
    graph.write()
    return left


@dataclass(frozen=True)
class _Sum:
    """What `experts` make and `addends`, summed by `nodes`; a gate among them is a `column` of what is read for it."""

    experts: NodeProto
    addends: tuple[str, ...] = ()
    column: int = 0
    nodes: tuple[NodeProto, ...] = ()

    @property
    def plugin(self) -> str:
        return next(name for name, addends in ADDENDS.items() if len(addends) == len(self.addends))


class _Graph(Values):
    def __init__(self, proto: GraphProto) -> None:
        super().__init__(proto)
        self.proto, self.nodes = proto, list(proto.node)
        self.constants = {t.name: t for t in proto.initializer}
        self.shapes = {v.name: _shape(v) for v in (*proto.value_info, *proto.input)}

    def sums(self, value: str) -> Iterator[_Sum]:
        """How a value is a sum with what experts make, most addends first."""
        if experts := self.only(value, EXPERTS, DOMAIN):
            yield _Sum(experts)
        add = self.only(value, "Add")
        for own, other in _both_ways(add):
            experts = self.only(own, EXPERTS, DOMAIN)
            if add and experts and self._alike(own, other):
                yield from self._gated(experts, add, other)
                yield _Sum(experts, (other,), nodes=(add,))

    def _gated(self, experts: NodeProto, add: NodeProto, value: str) -> Iterator[_Sum]:
        """The sum where the other value is a product with the sigmoid of a gate."""
        mul = self.only(value, "Mul")
        for factor, shared in _both_ways(mul):
            sigmoid = self.only(factor, "Sigmoid")
            if mul and sigmoid and self._alike(value, shared) and self._is_gate(sigmoid.input[0], value):
                gate, column = self._column(sigmoid.input[0])
                yield _Sum(experts, (shared, gate), column, (add, mul, sigmoid))

    def _alike(self, value: str, other: str) -> bool:
        return len(self.shapes.get(value, ())) == 3 and self.shapes[value] == self.shapes.get(other)

    def _is_gate(self, value: str, rows: str) -> bool:
        return self.shapes.get(value) == (*self.shapes[rows][:2], 1)

    def _column(self, gate: str) -> tuple[str, int]:
        """Where a gate is a column of what one product made, that product and which: a plugin reads it as it lies."""
        cut = self.makers.get(gate)
        if cut is None or cut.op_type != "Slice" or len(cut.input) != 4:
            return gate, 0
        stored = [self.constants.get(name) for name in cut.input[1:]]
        first, end, axis = (numpy_helper.to_array(s).reshape(-1).tolist() if s else [] for s in stored)
        if axis not in ([-1], [2]) or len(first) != 1 or first[0] < 0 or end != [first[0] + 1]:
            return gate, 0
        return cut.input[0], int(first[0])

    def join(self, norm: NodeProto, residual: str, found: _Sum) -> None:
        experts = found.experts
        inputs = [*experts.input[:OWN], residual, norm.input[2], *found.addends, *experts.input[OWN:]]
        node = make_node(found.plugin, inputs, norm.output, experts.name, domain=DOMAIN)
        node.attribute.extend([*experts.attribute, *norm.attribute])
        if len(found.addends) > 1:
            node.attribute.append(make_attribute(GATE_COLUMN, found.column))
        gone = {id(n) for n in (experts, *found.nodes)}
        self.nodes = [node if n is norm else n for n in self.nodes if id(n) not in gone]

    def write(self) -> None:
        """Leaves the nodes in the graph, but for a Slice that only a gate was read by, with its bounds."""
        read = self.outputs.union(*map(reads, self.nodes))
        unread = [n for n in self.nodes if n.op_type == "Slice" and read.isdisjoint(n.output)]
        kept = [n for n in self.nodes if n.op_type != "Slice" or not read.isdisjoint(n.output)]
        bounds = {name for n in unread for name in n.input[1:]}.difference(*map(reads, kept))
        tensors = [t for t in self.proto.initializer if t.name not in bounds]
        del self.proto.node[:], self.proto.initializer[:]
        self.proto.node.extend(kept)
        self.proto.initializer.extend(tensors)


def _both_ways(node: NodeProto | None) -> Iterator[tuple[str, str]]:
    """The two inputs of a node that may be in either place; none of no node."""
    if node:
        yield node.input[0], node.input[1]
        yield node.input[1], node.input[0]


def _shape(value: ValueInfoProto) -> tuple[int | str, ...]:
    """Empty where it is not known."""
    shape = tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)
    return shape if all(shape) else ()
