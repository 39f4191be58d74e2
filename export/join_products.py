"""One product in place of several by weights of the same tensor, where plugins read its result as it lies."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper
from onnx.helper import get_attribute_value, make_attribute, make_node

from llmexport.graphs.cut import reads
from llmexport.plugins.declared import Declared, declared
from llmexport.plugins.joined import COLUMNS, JOINED, Part, columns_of
from llmexport.plugins.spec import DOMAIN

FLOATS: dict[int, int] = {TensorProto.FLOAT: 4, TensorProto.FLOAT16: 2, TensorProto.BFLOAT16: 2}  # bytes of each
ALIGNED = 16  # bytes that a plugin reads at a time


def join_products(model: ModelProto, served: frozenset[str]) -> None:
    """Joins in place what the plugins in `served` can read.

          x           x                          x
          |           |                          |
        MatMul      MatMul             MatMul by all weights side by side
          |           |                          |
        [+ bias]      |                      [+ biases]
          |           |          =>             /   \\
        [Reshape]     |                        |     Slice
          |           |                        |       |
          op        others                Joined op   others

    TensorRT joins such products by itself, and then copies each part of the result for a plugin, which reads dense
    tensors alone. Legal if
    1. the inputs of an op that join are results of products by weights of one x, seen as heads or as they are,
    2. weights are floats, turned or cast or as they are stored, and x has two such products or more.
    Then all such products of x are joined, as TensorRT would join those that are left with the joined one. The
    builder puts the weights side by side; the graph holds each of them.
    """
    ops = {op.name: op for op in declared() if op.joins and f"{JOINED}{op.name}" in served}
    graph = _Graph(model.graph)
    for products in graph.products():
        if len(products) > 1 and (nodes := list(graph.plugins(products, ops))):
            graph.join(products, nodes)
    graph.write()


@dataclass(frozen=True)
class _Weight:
    shape: tuple[int, ...]
    dtype: int


@dataclass(frozen=True)
class _Product:
    """`node` multiplies by a weight [K, width], `add` adds `bias` if there is one; `result` is what comes of it."""

    node: NodeProto
    weight: _Weight
    result: str
    add: NodeProto | None = None
    bias: str = ""

    @property
    def width(self) -> int:
        return self.weight.shape[1]


class _Graph:
    def __init__(self, proto: GraphProto) -> None:
        self.proto = proto
        self.weights = {w.name: w for w in proto.initializer}
        self.outputs = {o.name for o in proto.output}
        self.nodes = {_key(n): n for n in proto.node}
        self.makers = {name: n for n in proto.node for name in n.output}
        self.readers: dict[str, dict[str, NodeProto]] = defaultdict(dict)  # by their keys
        for node in proto.node:
            for name in reads(node):
                self.readers[name][_key(node)] = node

    def products(self) -> list[list[_Product]]:
        """Products by weights, those of one tensor together."""
        found: dict[str, list[_Product]] = defaultdict(list)
        for node in self.nodes.values():
            weight = self._weight(node.input[1]) if node.op_type == "MatMul" else None
            if weight and len(weight.shape) == 2:
                found[node.input[0]].append(self._biased(_Product(node, weight, node.output[0])))
        # Whole vectors first: what is behind a narrow result would not be read in vectors either.
        return [sorted(its, key=lambda p: p.width * FLOATS[p.weight.dtype] % ALIGNED > 0) for its in found.values()]

    def _weight(self, name: str) -> _Weight | None:
        """The floats that a value is, turned or cast or as they are stored."""
        if stored := self.weights.get(name):
            return _Weight(tuple(stored.dims), stored.data_type) if stored.data_type in FLOATS else None
        node = self.makers.get(name)
        source = self._weight(node.input[0]) if node and node.op_type in ("Transpose", "Cast") else None
        if node is None or source is None:
            return None
        said = {a.name: get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Cast":
            return replace(source, dtype=said["to"]) if said["to"] in FLOATS else None
        axes = said.get("perm", range(len(source.shape))[::-1])
        return replace(source, shape=tuple(source.shape[i] for i in axes))

    def _biased(self, product: _Product) -> _Product:
        """With the bias that is added to it, where nothing else reads it."""
        readers = list(self.readers[product.result].values())
        if len(readers) != 1 or readers[0].op_type != "Add" or product.result in self.outputs:
            return product
        bias = next((n for n in readers[0].input if n != product.result), "")
        if self._weight(bias) != _Weight((product.width,), product.weight.dtype):
            return product
        return replace(product, add=readers[0], bias=bias, result=readers[0].output[0])

    def plugins(self, products: list[_Product], ops: dict[str, Declared]) -> Iterator[tuple[NodeProto, list[Part]]]:
        """The nodes of `ops` whose inputs that join are all made of the products, each of whose columns are known."""
        made = {p.result: (p, first) for p, first in zip(products, _firsts(products), strict=True)}
        for node in self.nodes.values():
            op = ops.get(node.op_type) if node.domain == DOMAIN else None
            given = dict(zip(op.inputs, node.input, strict=False)) if op else {}
            parts = [self._part(n, given.get(n, ""), len(op.inputs[n]) - 2, made) for n in op.joins] if op else []
            if parts and None not in parts:
                yield node, [p for p in parts if p]

    def _part(self, name: str, value: str, rank: int, made: dict[str, tuple[_Product, int]]) -> Part | None:
        """The columns that a value of B, T and `rank` dimensions more is a view of."""
        if rank == 1 and value in made:
            product, first = made[value]
            return Part(name, first, (product.width,))
        node = self.makers.get(value)
        if node is None or node.op_type != "Reshape" or node.input[0] not in made:
            return None
        product, first = made[node.input[0]]
        shape = self.weights.get(node.input[1])
        sizes = tuple(numpy_helper.to_array(shape).tolist()) if shape else ()
        seen = len(sizes) == rank + 2 and not any(sizes[:2]) and math.prod(sizes[2:]) == product.width
        return Part(name, first, sizes[2:]) if seen else None

    def join(self, products: list[_Product], nodes: list[tuple[NodeProto, list[Part]]]) -> None:
        """One product in place of these; `nodes` read it by themselves, all others a Slice of it."""
        name, weight = f"{products[0].node.name}/joined", products[0].weight
        firsts = _firsts(products)
        width = firsts[-1] + products[-1].width
        spare = -width % (ALIGNED // FLOATS[weight.dtype])
        self._add("MatMul", [products[0].node.input[0], self._side_by_side(products, spare, name)], name)
        joined = name
        if any(p.add for p in products):
            biases = [p.bias or self._zeros(p.node.name, p.width, dtype=weight.dtype) for p in products]
            biases += [self._zeros(f"{name}/bias", spare, dtype=weight.dtype)] if spare else []
            self._add("Concat", biases, f"{name}/biases", axis=0)
            joined = self._add("Add", [name, f"{name}/biases"], f"{name}/biased")
        for product in products:
            for gone in (product.node, product.add):
                self._drop(gone)
        for node, parts in nodes:
            self._read(node, parts, joined)
        for product, first in zip(products, firsts, strict=True):
            if self.readers[product.result] or product.result in self.outputs:
                bounds = {"from": first, "to": first + product.width, "axis": -1}
                given = [self._weights(f"{product.result}/{n}", np.array([v])) for n, v in bounds.items()]
                self._add("Slice", [joined, *given], product.result)

    def _side_by_side(self, products: list[_Product], spare: int, name: str) -> str:
        """The weights [K, columns], with `spare` columns of zeros behind them."""
        weights, (depth, _), dtype = (
            [p.node.input[1] for p in products],
            products[0].weight.shape,
            products[0].weight.dtype,
        )
        turned = [self._turned(w) for w in weights]
        rows = [w for w in turned if w]
        if len(rows) < len(weights):
            zeros = [self._zeros(name, depth, spare, dtype=dtype)] if spare else []
            return self._add("Concat", [*weights, *zeros], f"{name}/weights", axis=1)
        # The builder copies rows whole, and multiplies by them as they lie.
        zeros = [self._zeros(name, spare, depth, dtype=dtype)] if spare else []
        self._add("Concat", [*rows, *zeros], f"{name}/rows", axis=0)
        return self._add("Transpose", [f"{name}/rows"], f"{name}/weights")

    def _turned(self, name: str) -> str:
        """What a weight is the Transpose of, if it is one."""
        node = self.makers.get(name)
        return node.input[0] if node is not None and node.op_type == "Transpose" else ""

    def _read(self, node: NodeProto, parts: list[Part], joined: str) -> None:
        """Makes the node that of the plugin that reads `joined`."""
        op = next(op for op in declared() if op.name == node.op_type)
        given_by_name = [*zip(op.inputs, node.input, strict=False)]
        rest = [given for name, given in given_by_name if name not in op.joins]
        for given in [given for name, given in given_by_name if name in op.joins]:
            self.readers[given].pop(_key(node), None)
            if given in self.nodes and not self.readers[given] and given not in self.outputs:
                self._drop(self.nodes[given])
        node.op_type = f"{JOINED}{op.name}"
        node.input[:] = [joined, *rest]
        node.attribute.append(make_attribute(COLUMNS, columns_of(parts)))

    def _add(self, kind: str, given: list[str], made: str, axis: int | None = None) -> str:
        self.nodes[made] = make_node(kind, given, [made], made, axis=axis)
        return made

    def _drop(self, node: NodeProto | None) -> None:
        if node is not None:
            del self.nodes[_key(node)]
            for name in reads(node):
                self.readers[name].pop(_key(node), None)

    def _zeros(self, of: str, *shape: int, dtype: int) -> str:
        name = f"{of}/zeros"
        self.proto.initializer.append(TensorProto(name=name, dims=shape, data_type=dtype))
        self.proto.initializer[-1].raw_data = bytes(math.prod(shape) * FLOATS[dtype])
        return name

    def _weights(self, name: str, values: np.ndarray) -> str:
        self.proto.initializer.append(numpy_helper.from_array(values, name))
        return name

    def write(self) -> None:
        """Leaves the nodes in the graph, each behind those that it reads."""
        makers = {name: n for n in self.nodes.values() for name in n.output}
        waiting, done = [*reversed(self.nodes.values())], dict[str, NodeProto]()
        while waiting:
            node = waiting[-1]
            missing = [m for m in map(makers.get, reads(node)) if m is not None and _key(m) not in done]
            if missing and _key(node) not in done:
                waiting += missing
            else:
                done[_key(waiting.pop())] = node
        del self.proto.node[:]
        self.proto.node.extend(done.values())


def _firsts(products: list[_Product]) -> list[int]:
    """The first column of each in the joined product."""
    return [0, *itertools.accumulate(p.width for p in products[:-1])]


def _key(node: NodeProto) -> str:
    """The first output of a node that has a name, by which it is known."""
    return next(name for name in node.output if name)
