"""One product in place of several by weights of the same tensor, where plugins read its result as it lies."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, numpy_helper
from onnx.helper import make_attribute, make_node

from llmexport.export.joined_weights import FLOATS, Weight, Weights
from llmexport.export.packed.given import Given
from llmexport.graphs.cut import makers_of, needed, reads
from llmexport.plugins.declared import declared
from llmexport.plugins.joined import BIASABLE, BIASED, COLUMNS, JOINED, Part, columns_of
from llmexport.plugins.shared_route import declared_routes
from llmexport.plugins.spec import DOMAIN

ALIGNED = 16  # bytes that a plugin reads at a time


def join_products(model: ModelProto, served: frozenset[str], given: list[Given], folder: Path) -> list[Given]:
    """Joins in place what the plugins in `served` can read; returns the constants that are given otherwise than they
    lie, of which `given` are before. Weights' files lie in `folder`.

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
    2. x has two such products or more, by weights that are stored and dequantised alike, rows with scales of their own.
    Biases that are stored are added by a plugin that does so, if nothing else reads what they are added to.
    Then all such products of x are joined, as TensorRT would join those that are left with the joined one. The
    builder puts floats side by side; the graph holds each of them.
    """
    graph = _Graph(model.graph, served, given, folder)
    joins = [(its, nodes) for its in graph.products() if len(its) > 1 and (nodes := list(graph.plugins(its)))]
    for products, nodes in joins:
        graph.join(products, nodes)
    return graph.write() if joins else given


@dataclass(frozen=True)
class _Product:
    """`node` multiplies by a weight [K, width], `add` adds `bias` if there is one; `result` is what comes of it."""

    node: NodeProto
    weight: Weight
    result: str
    add: NodeProto | None = None
    bias: str = ""

    @property
    def width(self) -> int:
        return self.weight.shape[1]


class _Graph:
    def __init__(self, proto: GraphProto, served: frozenset[str], given: list[Given], folder: Path) -> None:
        self.proto = proto
        self.biasable = {op for op in BIASABLE if f"{BIASED}{JOINED}{op}" in served}
        ops = (*declared(), *declared_routes())
        self.ops = {op.name: op for op in ops if op.joins and f"{JOINED}{op.name}" in served}
        self.outputs = {o.name for o in proto.output}
        self.nodes = {_key(n): n for n in proto.node}
        self.makers = makers_of(proto.node)
        self.weights = Weights(proto, self.makers, given, folder)
        self.readers: dict[str, dict[str, NodeProto]] = defaultdict(dict)  # by their keys
        for node in proto.node:
            for name in reads(node):
                self.readers[name][_key(node)] = node

    def products(self) -> list[list[_Product]]:
        """Products by weights, those of one tensor together whose weights are made alike."""
        found: dict[tuple[str, str], list[_Product]] = defaultdict(list)
        for node in self.nodes.values():
            weight = self.weights.of(node.input[1]) if node.op_type == "MatMul" else None
            if weight and weight.dtype in FLOATS and len(weight.shape) == 2:
                product = self._biased(_Product(node, weight, node.output[0]))
                found[node.input[0], weight.packed].append(product)
        # Whole vectors first: what is behind a narrow result would not be read in vectors either.
        return [sorted(its, key=lambda p: p.width * FLOATS[p.weight.dtype] % ALIGNED > 0) for its in found.values()]

    def _biased(self, product: _Product) -> _Product:
        """With the bias that is added to it, where nothing else reads it."""
        readers = list(self.readers[product.result].values())
        if len(readers) != 1 or readers[0].op_type != "Add" or product.result in self.outputs:
            return product
        bias = next((n for n in readers[0].input if n != product.result), "")
        if self.weights.of(bias) != Weight((product.width,), product.weight.dtype):
            return product
        return replace(product, add=readers[0], bias=bias, result=readers[0].output[0])

    def plugins(self, products: list[_Product]) -> Iterator[tuple[NodeProto, list[Part]]]:
        """The nodes whose inputs that join are all made of the products, with the columns of these."""
        if products[0].weight.packed and _spare(products):
            return
        made = {p.result: (p, first) for p, first in zip(products, _firsts(products), strict=True)}
        for node in self.nodes.values():
            if node.domain != DOMAIN or node.op_type not in self.ops:
                continue
            op = self.ops[node.op_type]
            given = dict(zip(op.inputs, node.input, strict=False))
            parts = [self._part(n, given.get(n, ""), len(op.inputs[n]) - 2, made) for n in op.joins]
            if None not in parts:
                yield node, [p for p in parts if p]

    def _part(self, name: str, value: str, rank: int, made: dict[str, tuple[_Product, int]]) -> Part | None:
        """The columns that a value of B, T and `rank` dimensions more is a view of."""
        if rank == 1 and value in made:
            product, first = made[value]
            return Part(name, first, (product.width,))
        node = self.makers.get(value)
        if node is None or node.op_type != "Reshape" or node.input[0] not in made or node.input[1] not in self.weights:
            return None
        product, first = made[node.input[0]]
        sizes = tuple(numpy_helper.to_array(self.weights[node.input[1]]).tolist())
        seen = len(sizes) == rank + 2 and not any(sizes[:2]) and math.prod(sizes[2:]) == product.width
        return Part(name, first, sizes[2:]) if seen else None

    def join(self, products: list[_Product], nodes: list[tuple[NodeProto, list[Part]]]) -> None:
        """One product in place of these; `nodes` read it by themselves, all others a Slice of it."""
        name, spare, dtype = f"{products[0].node.name}/joined", _spare(products), products[0].weight.dtype
        self._add(*self.weights.side_by_side([p.node.input[1] for p in products], spare, f"{name}/weights"))
        self._add(make_node("MatMul", [products[0].node.input[0], f"{name}/weights"], [name], name))
        given, prefix = [name], JOINED
        for product in products:
            self._drop(product.node)
            if product.add:
                self._drop(product.add)
        rests = [self._rest(node) for node, _ in nodes]
        cut = [
            (product, first)
            for product, first in zip(products, _firsts(products), strict=True)
            if self.readers[product.result] or product.result in self.outputs
        ]
        if any(p.add for p in products):
            biases = [p.bias or self.weights.zeros(f"{p.node.name}/zeros", (p.width,), dtype) for p in products]
            biases += [self.weights.zeros(f"{name}/biases/zeros", (spare,), dtype)] if spare else []
            reads_biases = not cut and all(node.op_type in self.biasable for node, _ in nodes)
            if reads_biases and self.weights.stored_together(biases, f"{name}/biases", dtype):
                given, prefix = [name, f"{name}/biases"], f"{BIASED}{JOINED}"
            else:
                given = [f"{name}/biased"]
                self._add(*self.weights.together(biases, f"{name}/biases"))
                self._add(make_node("Add", [name, f"{name}/biases"], given, given[0]))
        for (node, parts), rest in zip(nodes, rests, strict=True):
            node.op_type = f"{prefix}{node.op_type}"
            node.input[:] = [*given, *rest]
            node.attribute.append(make_attribute(COLUMNS, columns_of(parts)))
        for product, first in cut:
            bounds = {"from": first, "to": first + product.width, "axis": -1}
            stored = [numpy_helper.from_array(np.array([v]), f"{product.result}/{n}") for n, v in bounds.items()]
            inputs = [given[0], *map(self.weights.add, stored)]
            self._add(make_node("Slice", inputs, [product.result], product.result))

    def _rest(self, node: NodeProto) -> list[str]:
        """The inputs of a node that do not join; it reads the others no more."""
        op, rest = self.ops[node.op_type], list[str]()
        for name, given in zip(op.inputs, node.input, strict=False):
            if name not in op.joins:
                rest.append(given)
                continue
            self.readers[given].pop(_key(node), None)
            if given in self.nodes and not self.readers[given] and given not in self.outputs:
                self._drop(self.nodes[given])
        return rest

    def _add(self, *nodes: NodeProto) -> None:
        self.nodes.update({_key(n): n for n in nodes})

    def _drop(self, node: NodeProto) -> None:
        del self.nodes[_key(node)]
        for name in reads(node):
            self.readers[name].pop(_key(node), None)

    def write(self) -> list[Given]:
        """Leaves the nodes in the graph that are read, and returns what is given."""
        nodes = needed(self.nodes.values(), self.outputs)
        read = self.outputs.union(*map(reads, nodes))
        del self.proto.node[:]
        self.proto.node.extend(nodes)
        return self.weights.kept(read)


def _firsts(products: list[_Product]) -> list[int]:
    """The first column of each in the joined product."""
    return [0, *itertools.accumulate(p.width for p in products[:-1])]


def _spare(products: list[_Product]) -> int:
    """Columns behind them that fill a vector."""
    return -sum(p.width for p in products) % (ALIGNED // FLOATS[products[0].weight.dtype])


def _key(node: NodeProto) -> str:
    """The first output of a node that has a name, by which it is known."""
    return next(name for name in node.output if name)
