"""A shared expert that is one more of the routed ones, which the router always chooses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto
from onnx.helper import make_attribute, make_node

from llmexport.export.expert_stacks import Stack, Stacks, attributes_of
from llmexport.export.joined_weights import FLOATS
from llmexport.graphs.cut import Values, needed, reads
from llmexport.plugins.normed import EXPERTS, OWN
from llmexport.plugins.packed_formats import PLAIN
from llmexport.plugins.shared_route import MOST_EXPERTS, ROUTE, SHARED_ROUTES, SLOTS
from llmexport.plugins.spec import DOMAIN

ACT = "GatedAct"
SAME = ("activation", "alpha", "limit")  # attributes of an MLP's GatedAct and of MoeExperts
# Bytes of a shared expert's weights up to which it is joined: as many cost half of the 6 us that three launches take,
# and 0.2 us a token of a prompt, see README.md, What an engine launches.
LARGEST = 48 * 2**20


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
class _Shared:
    """An MLP of `count` experts beside `experts`, which `route` chooses; `add` sums both, `act` is the MLP's."""

    experts: NodeProto
    route: NodeProto
    cast: NodeProto | None  # of the weights that `route` makes
    act: NodeProto
    add: NodeProto
    gate: str
    weights: tuple[TensorProto, ...]  # gate, up and down
    stacks: tuple[Stack, ...]
    count: int

    @property
    def plugin(self) -> str:
        return next(name for name, gates in SHARED_ROUTES.items() if bool(gates) == bool(self.gate))


class _Graph(Values):
    def __init__(self, proto: GraphProto) -> None:
        super().__init__(proto)
        self.proto, self.nodes = proto, [*proto.node]
        self.made: list[NodeProto] = []
        self.gone: set[int] = set()
        self.types = {v.name: _type(v) for v in (*proto.value_info, *proto.input)}
        self.stacks = Stacks(proto, self.makers)

    def beside(self, experts: NodeProto) -> Iterator[_Shared]:
        """The shared expert whose result is added to what `experts` make."""
        [route, cast], [x, *_] = self._route(experts), experts.input
        stacks = tuple(s for n in experts.input[3:OWN] if (s := self.stacks.of(n)))
        if route is None or len(stacks) < 2 or any(experts.input[OWN:]):
            return
        for add, value in self._summed(experts.output[0]):
            for mixed, gate in self._ungated(value):
                down = self.only(mixed, "MatMul")
                act = self.only(down.input[0], ACT, DOMAIN) if down else None
                halves = [self.only(n, "MatMul") for n in act.input] if act else []
                products = [n for n in (*halves, down) if n is not None]
                weights = tuple(t for n in products if (t := self.stacks.linear(n.input[1])))
                if act is None or len(weights) != 3 or any(h.input[0] != x for h in products[:2]):
                    continue
                count = _count(experts, act, weights, stacks)
                if count and self._weighs(gate, route, experts):
                    yield _Shared(experts, route, cast, act, add, gate, weights, stacks, count)

    def _summed(self, value: str) -> Iterator[tuple[NodeProto, str]]:
        """The Add that alone reads a value, and what it adds to it."""
        readers = self.readers[value]
        if len(readers) == 1 and readers[0].op_type == "Add" and value not in self.outputs:
            [add] = readers
            yield add, add.input[1] if add.input[0] == value else add.input[0]

    def _route(self, experts: NodeProto) -> tuple[NodeProto | None, NodeProto | None]:
        """What chooses them, and what casts their weights, if there is that."""
        weights, chosen = experts.input[1:3]
        cast = self.only(weights, "Cast")
        routed = cast.input[0] if cast else weights
        route = self.only(routed, ROUTE, DOMAIN)
        same = route is not None and route is self.only(chosen, ROUTE, DOMAIN) and [*route.output] == [routed, chosen]
        return (route if same else None), cast

    def _ungated(self, value: str) -> Iterator[tuple[str, str]]:
        """What a value is times the sigmoid of a gate, and the gate; or itself, and none."""
        yield value, ""
        mul = self.only(value, "Mul")
        for mixed, factor in itertools.permutations(mul.input, 2) if mul else ():
            if sigmoid := self.only(factor, "Sigmoid"):
                yield mixed, sigmoid.input[0]

    def _weighs(self, gate: str, route: NodeProto, experts: NodeProto) -> bool:
        """Whether the router can make weights of a gate."""
        if not gate:
            return True
        [kind, *its], [wanted, *logits] = (self.types.get(n, [0]) for n in (gate, route.input[0]))
        known = kind == wanted and all(its) and its == [*logits[:2], 1]
        return known and not attributes_of(experts)["scale_input"]

    def join(self, shared: _Shared) -> None:
        route, experts, said = shared.route, shared.experts, attributes_of(shared.experts)
        name, gates, [x, *_] = f"{experts.name}/shared", [shared.gate] if shared.gate else [], experts.input
        inputs = [route.input[0], *gates, *route.input[1:]]
        # They are no values of the graph as it was, which have other sizes.
        weights, chosen = (f"{n}/slots" for n in route.output)
        chooses = make_node(shared.plugin, inputs, [weights, chosen], route.name, domain=DOMAIN)
        slots = attributes_of(route)["top_k"] + shared.count
        chooses.attribute.extend([*route.attribute, make_attribute(SLOTS, slots)])
        if shared.cast:
            weights = f"{shared.cast.output[0]}/slots"
            self.made.append(
                make_node("Cast", chooses.output[:1], [weights], weights, to=attributes_of(shared.cast)["to"])
            )
        *halves, down = shared.weights
        rows = {
            f"{name}/gate_up": self.stacks.gate_up(halves, shared.count, said, f"{name}/gate_up"),
            f"{name}/down": self.stacks.down(down, shared.count, said, f"{name}/down"),
        }
        longer = [self.stacks.longer(s, rows[n], shared.count, n) for s, n in zip(shared.stacks, rows, strict=True)]
        computes = make_node(EXPERTS, [x, weights, chosen, *longer], shared.add.output, experts.name, domain=DOMAIN)
        computes.attribute.extend(experts.attribute)
        self.made += [chooses, computes]
        self.gone |= {id(n) for n in (route, experts, shared.add)}

    def write(self) -> None:
        """Leaves what is read in the graph."""
        if not self.made:
            return
        kept = [n for n in self.nodes if id(n) not in self.gone]
        nodes = needed([*kept, *self.made, *self.stacks.made], self.outputs)
        read = self.outputs.union(*map(reads, nodes))
        tensors = [t for t in self.proto.initializer if t.name in read]
        del self.proto.node[:], self.proto.initializer[:]
        self.proto.node.extend(nodes)
        self.proto.initializer.extend(tensors)


def _count(experts: NodeProto, act: NodeProto, weights: tuple[TensorProto, ...], stacks: tuple[Stack, ...]) -> int:
    """Of how many routed experts an MLP is made; 0 if of no whole number, or if it is another."""
    said, own = attributes_of(experts), attributes_of(act)
    types = {*(t.data_type for t in weights), *(s.dtype for s in stacks)}
    stored = len(types) == 1 and types <= FLOATS.keys()
    if not stored or said["format"] != PLAIN.encode() or any(said[n] != own[n] for n in SAME):
        return 0
    turn = -1 if said["transposed"] else 1
    (routed, *first), (_, *second) = (s.shape for s in stacks)
    (both, hidden), (rows, size) = first[::turn], second[::turn]
    width = weights[0].dims[0]
    shapes = [[width, hidden], [width, hidden], [hidden, width]]
    count = width // size
    fits = [[*t.dims] for t in weights] == shapes and (rows, both) == (hidden, 2 * size)
    taken = sum(math.prod(t.dims) * FLOATS[t.data_type] for t in weights)
    return count if fits and width == count * size and routed + count <= MOST_EXPERTS and taken <= LARGEST else 0


def _type(value: ValueInfoProto) -> list[int | str]:
    """The type of its elements, and its sizes."""
    its = value.type.tensor_type
    return [its.elem_type, *(d.dim_param or d.dim_value for d in its.shape.dim)]
