"""A shared expert that is one more of the routed ones, which the router always chooses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper
from onnx.helper import get_attribute_value, make_attribute, make_node

from llmexport.export.joined_weights import FLOATS
from llmexport.graphs.cut import makers_of, needed, readers_of, reads
from llmexport.plugins.normed import EXPERTS, OWN
from llmexport.plugins.packed_formats import PLAIN
from llmexport.plugins.shared_route import MOST_EXPERTS, ROUTE, SHARED_ROUTES, SLOTS
from llmexport.plugins.spec import DOMAIN

ACT = "GatedAct"
SAME = ("activation", "alpha", "limit")  # attributes of an MLP's GatedAct and of MoeExperts
# Bytes of a shared expert's weights up to which it is joined. A launch of decode takes about 2 us, and three are saved;
# an H200 read the weights of one expert more at 3.2 TB/s in MoeExperts (Qwen3.5), a product alone may read 3.9 of its
# 4.3: 6 us are lost at 100 MB, and more where experts are transposed (Llama 4: 2.7 TB/s, 250 MB).
LARGEST = 96 * 2**20


def join_shared(model: ModelProto, nodes: dict[str, str], served: frozenset[str]) -> dict[str, str]:
    """Makes shared experts routed ones in place, where the plugins in `served` compute them so; returns the nodes that
    are left to plugins, name -> op or such a plugin, of which `nodes` are before.

        logits             x            gate                logits, gate
          |              /   \\           |                       |
       MoeRoute      MatMul MatMul   [Sigmoid]           [Gated]SharedMoeRoute
          |              \\   /           |                       |
       [Cast]          GatedAct          |                     [Cast]
          |                |             |                       |
          |             MatMul           |          =>       MoeExperts of E + n experts
       MoeExperts          |            /
          |              [Mul] --------
          |                |
          +----- Add ------+

    Each of the n is I rows of gate and up and I columns of down, behind the E as they lie; I is a routed expert's
    width. Legal if
    1. both read one x, and everything between is read by the next of them alone, and is no output;
    2. the MLP's width is n times I, and E + n no more than the kernels sort;
    3. both have the same activation, no biases, and weights that are stored in one type of float, the MLP's as
       nn.Linear has them, or cast;
    4. a gate is a number a token of the logits' type, and does not scale what goes in;
    5. the weights take at most LARGEST bytes.
    The graph rounds what the shared expert made, its product with the gate, and the sum; here a slice of it is rounded,
    and the sum of all experts once.
    """
    graph, left = _Graph(model.graph), dict(nodes)
    for experts in (n for n in graph.nodes if (n.domain, n.op_type) == (DOMAIN, EXPERTS)):
        fitting = (s for s in graph.beside(experts) if s.plugin in served)
        for shared in itertools.islice(fitting, 1):
            graph.join(shared)
            left[shared.route.name] = shared.plugin
            del left[shared.act.name]
    graph.write()
    return left


@dataclass(frozen=True)
class _Stack:
    """A matrix of all experts: its value, or the tensors of rows that it is put together of."""

    rows: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: int


@dataclass(frozen=True)
class _Shared:
    """An MLP of `count` experts beside `experts`, which `route` chooses; `add` sums both, `act` is the MLP's."""

    experts: NodeProto
    route: NodeProto
    act: NodeProto
    add: NodeProto
    gate: str
    weights: tuple[TensorProto, ...]  # gate, up and down
    stacks: tuple[_Stack, ...]
    count: int
    resized: tuple[str, ...]  # values that have more columns now

    @property
    def plugin(self) -> str:
        return next(name for name, gates in SHARED_ROUTES.items() if bool(gates) == bool(self.gate))


@dataclass
class _Graph:
    proto: GraphProto
    made: list[NodeProto] = field(default_factory=list)
    gone: set[int] = field(default_factory=set)
    resized: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.nodes, self.outputs = [*self.proto.node], {o.name for o in self.proto.output}
        self.constants = {t.name: t for t in self.proto.initializer}
        self.types = {v.name: v.type.tensor_type for v in (*self.proto.value_info, *self.proto.input)}
        self.makers, self.readers = makers_of(self.nodes), readers_of(self.nodes)

    def beside(self, experts: NodeProto) -> Iterator[_Shared]:
        """The shared expert whose result is added to what `experts` make."""
        route, resized = self._route(experts)
        [*readers] = self.readers[experts.output[0]]
        alone = len(readers) == 1 and experts.output[0] not in self.outputs
        if route is None or not alone or readers[0].op_type != "Add" or any(experts.input[OWN:]):
            return
        [add] = readers
        for value in (n for n in add.input if n != experts.output[0]):
            for mixed, gate in self._ungated(value):
                down = self._only(mixed, "MatMul")
                act = self._only(down.input[0], ACT) if down else None
                halves = [self._only(n, "MatMul") for n in act.input] if act else []
                if act and down and len(halves) == 2 and all(h and h.input[0] == experts.input[0] for h in halves):
                    weights = tuple(t for n in (*halves, down) if n and (t := self._stored(n.input[1])))
                    stacks = tuple(s for n in experts.input[3:OWN] if (s := self._stack(n)))
                    count = _count(experts, act, weights, stacks)
                    if count and self._weighs(gate, route, experts):
                        yield _Shared(experts, route, act, add, gate, weights, stacks, count, resized)

    def _only(self, value: str, kind: str) -> NodeProto | None:
        """The node of this kind that makes a value, if that is one input of one other node, and nothing else."""
        node = self.makers.get(value)
        known = node is not None and (node.domain, node.op_type) == (DOMAIN if kind in (ROUTE, ACT) else "", kind)
        return node if known and len(self.readers[value]) == 1 and value not in self.outputs else None

    def _route(self, experts: NodeProto) -> tuple[NodeProto | None, tuple[str, ...]]:
        """What chooses them, and the values between."""
        weights, chosen = experts.input[1:3]
        cast = self._only(weights, "Cast")
        routed = cast.input[0] if cast else weights
        route, other = self._only(routed, ROUTE), self._only(chosen, ROUTE)
        same = route is not None and route is other and [*route.output] == [routed, chosen]
        return (route if same else None), (weights, routed, chosen)

    def _ungated(self, value: str) -> Iterator[tuple[str, str]]:
        """What a value is times the sigmoid of a gate, and the gate; or itself, and none."""
        yield value, ""
        mul = self._only(value, "Mul")
        for mixed, factor in itertools.permutations(mul.input, 2) if mul else ():
            if sigmoid := self._only(factor, "Sigmoid"):
                yield mixed, sigmoid.input[0]

    def _weighs(self, gate: str, route: NodeProto, experts: NodeProto) -> bool:
        """Whether the router can make weights of a gate."""
        if not gate:
            return True
        its, logits = self.types.get(gate), self.types.get(route.input[0])
        known = its is not None and logits is not None and its.elem_type == logits.elem_type
        return (
            known
            and _shape(its)[:2] == _shape(logits)[:2]
            and _shape(its)[2:] == (1,)
            and not _said(experts)["scale_input"]
        )

    def _stored(self, name: str) -> TensorProto | None:
        """The tensor [out, in] of floats that a product's weight is the transpose of."""
        turn = self.makers.get(name)
        if turn is None or turn.op_type != "Transpose" or _said(turn).get("perm", [1, 0]) != [1, 0]:
            return None
        cast = self.makers.get(turn.input[0])
        stored = self.constants.get(cast.input[0] if cast is not None and cast.op_type == "Cast" else turn.input[0])
        return stored if stored is not None and stored.data_type in FLOATS and len(stored.dims) == 2 else None

    def _stack(self, name: str) -> _Stack | None:
        if stored := self.constants.get(name):
            return _Stack((name,), tuple(stored.dims), stored.data_type)
        shaped = self.makers.get(name)
        rows = self.makers.get(shaped.input[0]) if shaped is not None and shaped.op_type == "Reshape" else None
        shape = self.constants.get(shaped.input[1]) if shaped is not None and rows is not None else None
        if rows is None or shape is None or rows.op_type != "Concat" or _said(rows)["axis"] != 0:
            return None
        tensors = [self.constants.get(n) for n in rows.input]
        types = {t.data_type if t is not None and len(t.dims) == 2 else 0 for t in tensors}
        return (
            _Stack(tuple(rows.input), tuple(numpy_helper.to_array(shape).tolist()), min(types))
            if len(types) == 1
            else None
        )

    def join(self, shared: _Shared) -> None:
        route, experts, said = shared.route, shared.experts, _said(shared.experts)
        name, gates = f"{experts.name}/shared", [shared.gate] if shared.gate else []
        inputs = [route.input[0], *gates, *route.input[1:]]
        chooses = make_node(shared.plugin, inputs, route.output, route.name, domain=DOMAIN)
        chooses.attribute.extend([*route.attribute, make_attribute(SLOTS, _said(route)["top_k"] + shared.count)])
        gate_up, down = shared.stacks
        stacks = [
            self._longer(gate_up, self._gate_up(shared, f"{name}/gate_up", said), shared.count, f"{name}/gate_up"),
            self._longer(down, self._down(shared, f"{name}/down", said), shared.count, f"{name}/down"),
        ]
        computes = make_node(EXPERTS, [*experts.input[:3], *stacks], shared.add.output, experts.name, domain=DOMAIN)
        computes.attribute.extend(experts.attribute)
        self.made += [chooses, computes]
        self.gone |= {id(n) for n in (route, experts, shared.add)}
        self.resized |= {*shared.resized}

    def _gate_up(self, shared: _Shared, name: str, said: dict[str, object]) -> list[str]:
        """Rows of gate and of up, as MoeExperts reads each expert."""
        halves, [width, hidden] = [t.name for t in shared.weights[:2]], shared.weights[0].dims
        plain = not (said["transposed"] or said["interleaved"])
        if plain and shared.count == 1:
            return halves
        size, axis = width // shared.count, 2 if said["interleaved"] else 1
        shape = [shared.count, size, hidden]
        shape.insert(axis, 1)
        parts = [self._shaped(half, shape, f"{name}/{i}") for i, half in enumerate(halves)]
        both = self._make("Concat", parts, f"{name}/both", axis=axis)
        if not said["transposed"]:
            return [self._shaped(both, [-1, hidden], f"{name}/rows")]
        whole = self._shaped(both, [shared.count, 2 * size, hidden], f"{name}/whole")
        turned = self._make("Transpose", [whole], f"{name}/turned", perm=[0, 2, 1])
        return [self._shaped(turned, [-1, 2 * size], f"{name}/rows")]

    def _down(self, shared: _Shared, name: str, said: dict[str, object]) -> list[str]:
        down, [hidden, width] = shared.weights[2].name, shared.weights[2].dims
        if shared.count == 1 and not said["transposed"]:
            return [down]
        size = width // shared.count
        apart = self._shaped(down, [hidden, shared.count, size], f"{name}/apart")
        perm = [1, 2, 0] if said["transposed"] else [1, 0, 2]
        turned = self._make("Transpose", [apart], f"{name}/turned", perm=perm)
        return [self._shaped(turned, [-1, hidden if said["transposed"] else size], f"{name}/rows")]

    def _longer(self, stack: _Stack, rows: list[str], count: int, name: str) -> str:
        """The stack with `count` experts of these rows behind it."""
        experts, *matrix = stack.shape
        own = [*stack.rows]
        if len(own) == 1 and len(self.constants[own[0]].dims) > 2:
            own = [self._shaped(own[0], [-1, matrix[-1]], f"{name}/own")]
        both = self._make("Concat", [*own, *rows], f"{name}/all", axis=0)
        return self._shaped(both, [experts + count, *matrix], name)

    def _shaped(self, value: str, shape: list[int], name: str) -> str:
        stored = numpy_helper.from_array(np.array(shape), f"{name}/shape")
        self.proto.initializer.append(stored)
        return self._make("Reshape", [value, stored.name], name)

    def _make(self, kind: str, inputs: list[str], name: str, **said: object) -> str:
        self.made.append(make_node(kind, inputs, [name], name, **said))
        return name

    def write(self) -> None:
        """Leaves what is read in the graph."""
        if not self.made:
            return
        nodes = needed([*(n for n in self.nodes if id(n) not in self.gone), *self.made], self.outputs)
        read = self.outputs.union(*map(reads, nodes))
        tensors = [t for t in self.proto.initializer if t.name in read]
        known = [v for v in self.proto.value_info if v.name not in self.resized]
        for kept, values in (
            (self.proto.node, nodes),
            (self.proto.initializer, tensors),
            (self.proto.value_info, known),
        ):
            del kept[:]
            kept.extend(values)


def _count(experts: NodeProto, act: NodeProto, weights: tuple[TensorProto, ...], stacks: tuple[_Stack, ...]) -> int:
    """Of how many routed experts an MLP is made; 0 if of no whole number, or if it is another."""
    said, own = _said(experts), _said(act)
    if len(weights) < 3 or len(stacks) < 2 or said["format"] != PLAIN.encode() or any(said[n] != own[n] for n in SAME):
        return 0
    types = {*(t.data_type for t in weights), *(s.dtype for s in stacks)}
    turn = -1 if said["transposed"] else 1
    (routed, *first), (_, *second) = (s.shape for s in stacks)
    (both, hidden), (rows, size) = first[::turn], second[::turn]
    width = weights[0].dims[0]
    shapes = [[width, hidden], [width, hidden], [hidden, width]]
    count = width // size
    fits = len(types) == 1 and [[*t.dims] for t in weights] == shapes and (rows, both) == (hidden, 2 * size)
    taken = sum(math.prod(t.dims) * FLOATS[t.data_type] for t in weights)
    return count if fits and width == count * size and routed + count <= MOST_EXPERTS and taken <= LARGEST else 0


def _said(node: NodeProto) -> dict[str, object]:
    return {a.name: get_attribute_value(a) for a in node.attribute}


def _shape(its: object) -> tuple[int | str, ...]:
    return tuple(d.dim_param or d.dim_value for d in its.shape.dim)
