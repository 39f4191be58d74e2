"""One plugin in place of AddRmsNorm, a router's product with what that norms, and the MoeRoute that chooses by it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from onnx import GraphProto, ModelProto, NodeProto, TensorProto
from onnx.helper import make_attribute, make_node

from llmexport.export.expert_stacks import attributes_of
from llmexport.export.joined_weights import FLOATS, Weights
from llmexport.graphs.cut import Values, needed, reads
from llmexport.plugins.normed_route import NORM, NORMED_ROUTES, WIDE
from llmexport.plugins.shared_route import SHARED_ROUTES
from llmexport.plugins.spec import DOMAIN

# By what routes, the plugin that norms and multiplies too.
PLUGINS = {route: plugin for plugin, route in NORMED_ROUTES.items()}


def join_routes(model: ModelProto, nodes: dict[str, str], served: frozenset[str], folder: Path) -> dict[str, str]:
    """Joins in place what the plugins in `served` compute at once; returns the nodes that are left to plugins, name ->
    op or such a plugin, of which `nodes` are before. Weights' files lie in `folder`.

        x, residual, weight
                |                          x, residual, weight, router's weight and bias, [gate's weight], [bias]
           AddRmsNorm                                                  |
            /      \\                                          Normed..MoeRoute
          sum       y -------- others                         /     |       |     \\
                    |                                       sum     y    weights  experts
                 [Cast]
                  /   \\                      =>
             MatMul   [MatMul]
                |         |
              [Add]       |
                |         |
             [..Shared]MoeRoute, [bias]
                /     \\
            [Cast]   experts
               |
            weights

    A node takes the name of what routes. It is so whether weights are constants or, beside a plan, inputs. Legal if
    1. AddRmsNorm has no norm of what it adds, y is of known type, and all that both make has a name;
    2. what is between is read by the next of them alone, and is no output; y, sum, weights and experts may be anything;
    3. the weight of a product is the transpose of one of y's type, which is stored, or cast of floats that are;
    4. the router's bias is of y's type and a number an expert, stored or cast likewise; so is the one of the choice, of
       any float;
    5. if y is cast, it is of 16 bits and becomes fp32, so do the router's weight and bias, its weights are cast back,
       and there is no gate.
    The graph rounds a product and its sum with the bias, here the sum alone is. Biases become stored constants, zeros
    where the router has none: what the builder computes of constants it would copy at each step to a plugin that it
    runs by itself.
    """
    graph, left = _Graph(model.graph, folder), dict(nodes)
    for route in graph.nodes:
        plugin = PLUGINS.get(route.op_type, "") if route.domain == DOMAIN else ""
        if plugin in served and (found := graph.routed(route)):
            graph.join(plugin, found)
            del left[found.norm.name]
            left[route.name] = plugin
    graph.write()
    return left


@dataclass(frozen=True)
class _Routed:
    """`route` chooses by what `norm` makes, of type `dtype`, times `weight` [E, C]; what is empty is not there.

    cast: of the weights that `route` makes, where it reads fp32 and they become `dtype` again.
    """

    norm: NodeProto
    route: NodeProto
    dtype: int
    weight: str
    router_bias: str
    gate_weights: tuple[str, ...]
    bias: str
    cast: NodeProto | None


class _Graph(Values):
    def __init__(self, proto: GraphProto, folder: Path) -> None:
        super().__init__(proto)
        self.proto, self.nodes = proto, [*proto.node]
        typed = (*proto.value_info, *proto.input, *proto.output)
        self.types = {v.name: v.type.tensor_type.elem_type for v in typed}
        self.weights = Weights(proto, self.makers, [], folder)
        self.made: dict[int, NodeProto] = {}  # by the norm whose place it has
        self.gone: set[int] = set()

    def routed(self, route: NodeProto) -> _Routed | None:
        """What a node that routes is one with, if a plugin computes that."""
        for value, router_bias in self._sums(route.input[0]):
            product = self.only(value, "MatMul")
            if product and (found := self._behind_norm(route, product, router_bias)):
                return found
        return None

    def _sums(self, logits: str) -> Iterator[tuple[str, str]]:
        """What logits are the sum of; or they themselves, and nothing."""
        yield logits, ""
        if add := self.only(logits, "Add"):
            yield from itertools.permutations(add.input, 2)

    def _behind_norm(self, route: NodeProto, product: NodeProto, router_bias: str) -> _Routed | None:
        cast = self.only(product.input[0], "Cast")
        y, wide = (cast.input[0], True) if cast else (product.input[0], False)
        norm, dtype = self.makers.get(y), self.types.get(y, 0)
        if norm is None or not self._is_norm(norm, y) or not _is_whole(route):
            return None
        back = self._cast_back(route.output[0], dtype) if wide else None
        if cast and (back is None or dtype == TensorProto.FLOAT or not _widens(cast)):
            return None
        gates = len(SHARED_ROUTES.get(route.op_type, ()))
        its = [p for n in route.input[1 : 1 + gates] if (p := self.only(n, "MatMul")) and p.input[0] == y]
        weight, *gate_weights = (self._rows(p.input[1], dtype) for p in (product, *its))
        every = self._shape(weight)[:1]
        if not every or [self._shape(w)[:1] for w in gate_weights] != [(1,)] * gates or (gates and wide):
            return None
        router_bias = self._narrow(router_bias) if wide else router_bias
        bias = "".join(route.input[1 + gates :])
        vectors = ((router_bias, {dtype}), (bias, {*FLOATS}))
        if not all(self._is_vector(v, every, dtypes) for v, dtypes in vectors if v):
            return None
        return _Routed(norm, route, dtype, weight, router_bias, tuple(gate_weights), bias, back)

    def _is_norm(self, node: NodeProto, y: str) -> bool:
        """Whether y is the norm of a sum, and nothing is normed before; none that another router has."""
        known = (node.domain, node.op_type) == (DOMAIN, NORM) and id(node) not in self.made
        return known and len(node.input) == 3 and _is_whole(node) and node.output[0] == y

    def _cast_back(self, weights: str, dtype: int) -> NodeProto | None:
        """What casts the weights, if nothing else reads them."""
        readers = self.readers[weights]
        only = len(readers) == 1 and readers[0].op_type == "Cast" and weights not in self.outputs
        return readers[0] if only and _to(readers[0]) == dtype else None

    def _rows(self, value: str, dtype: int) -> str:
        """The matrix of this type that a product's weight is the transpose of, in fp32 or as it is; or empty."""
        turned = False
        while not turned or self._dtype(value) != dtype:
            node = self.makers.get(value)
            if node is not None and _turns(node) and not turned:
                turned = True
            elif node is None or not _widens(node):
                return ""
            value = node.input[0]
        cast = self.makers.get(value)
        source = cast.input[0] if cast is not None and cast.op_type == "Cast" else value
        return value if source in self.weights and self.weights[source].data_type in FLOATS else ""

    def _dtype(self, value: str) -> int:
        weight = self.weights.of(value)
        return weight.dtype if weight else 0

    def _shape(self, value: str) -> tuple[int, ...]:
        weight = self.weights.of(value)
        return weight.shape if weight else ()

    def _narrow(self, bias: str) -> str:
        """What is cast to fp32; itself if it is none, and then of the wrong type."""
        node = self.makers.get(bias)
        return node.input[0] if node is not None and _widens(node) else bias

    def _is_vector(self, value: str, shape: tuple[int, ...], dtypes: set[int]) -> bool:
        known = self._shape(value) == shape and self._dtype(value) in dtypes
        return known and self.weights.numbers(value) is not None

    def join(self, plugin: str, found: _Routed) -> None:
        route, norm, name = found.route, found.norm, found.route.name
        router_bias = f"{name}/router_bias"
        if found.router_bias:
            router_bias = self._stored(found.router_bias, router_bias, found.dtype)
        else:
            self.weights.zeros(router_bias, self._shape(found.weight)[:1], found.dtype)
        bias = [self._stored(found.bias, f"{name}/bias", TensorProto.FLOAT)] if found.bias else []
        weights = found.cast.output[0] if found.cast else route.output[0]
        inputs = [*norm.input, found.weight, router_bias, *found.gate_weights, *bias]
        node = make_node(plugin, inputs, [*norm.output, weights, route.output[1]], name, domain=DOMAIN)
        node.attribute.extend([*route.attribute, *norm.attribute, make_attribute(WIDE, int(found.cast is not None))])
        self.made[id(norm)] = node
        self.gone |= {id(n) for n in (route, found.cast) if n is not None}

    def _stored(self, vector: str, name: str, dtype: int) -> str:
        """A constant of this type that a vector is: itself, or one of this name."""
        if vector in self.weights and self.weights[vector].data_type == dtype:
            return vector
        self.weights.stored_together([vector], name, dtype)
        return name

    def write(self) -> None:
        """Leaves what is read in the graph."""
        if not self.made:
            return
        kept = [self.made.get(id(n), n) for n in self.nodes if id(n) not in self.gone]
        nodes = needed(kept, self.outputs)
        del self.proto.node[:]
        self.proto.node.extend(nodes)
        self.weights.kept(self.outputs.union(*map(reads, nodes)))


def _is_whole(node: NodeProto) -> bool:
    """Whether both its outputs have names."""
    return len(node.output) == 2 and all(node.output)


def _to(cast: NodeProto) -> int:
    return int(attributes_of(cast)["to"])


def _widens(node: NodeProto) -> bool:
    return node.op_type == "Cast" and _to(node) == TensorProto.FLOAT


def _turns(node: NodeProto) -> bool:
    return node.op_type == "Transpose" and attributes_of(node).get("perm") == [1, 0]
