"""Binds the matrices of a graph that a checkpoint holds in few bits: nodes make each of them of what is stored."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import onnx

from llmexport.export.checkpoint import Checkpoint
from llmexport.export.packed.nbits import Multiplier
from llmexport.export.packed.nodes import external

if TYPE_CHECKING:
    from llmexport.export.weights import Parameter

__all__ = ["bind_matrices", "external", "value_of"]


def value_of(name: str) -> str:
    """The value that is the matrix of this name; the name itself may be that of a tensor."""
    return f"{name}/dequantised"


def bind_matrices(
    graph: onnx.GraphProto, wanted: Mapping[str, Parameter], checkpoint: Checkpoint, dtype: int, direct: bool
) -> dict[str, list[onnx.NodeProto]]:
    """By the name of each matrix of `wanted` that is in few bits, the nodes that make it in the type `dtype`.

    Their initialisers are added to the graph, and what read the matrix reads the value that they make. Where products
    alone read its transpose, the nodes make that, as runtimes keep such a matrix packed; or, if `direct`, the products
    read it as it is packed, where ONNX Runtime has such.
    """
    found = {n: p for p in wanted.values() if not p.role for n in p.sources if n in checkpoint.matrices}
    if not found:
        return {}
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in set(node.input):
            readers[name].append(node)
    made: dict[str, list[onnx.NodeProto]] = {}
    dropped: set[int] = set()
    before: dict[str, list[onnx.NodeProto]] = {}
    for name, parameter in found.items():
        maker = Multiplier(matrix=checkpoint.matrices[name], tensors=checkpoint.tensors, dtype=dtype)
        turns = [] if parameter.parts else readers[name]
        products = [p for t in turns for p in readers[t.output[0]]]
        value = value_of(name)
        turned = {t.output[0] for t in turns}
        if turns and all(map(turns_matrix, turns)) and all(multiplies_by(p, turned) for p in products):
            if direct and maker.fits:
                maker.multiply(products)
            else:
                maker.product(f"{value}/turned", products)
                for product in products:
                    product.input[1] = f"{value}/turned"
            dropped.update(id(t) for t in turns)
        else:
            maker.whole(value)
            for reader in turns:
                reader.input[:] = [value if n == name else n for n in reader.input]
        made[name] = maker.nodes
        for product_name, own in maker.before.items():
            before.setdefault(product_name, []).extend(own)
        graph.initializer.extend(maker.initializers)
    kept = []
    for node in graph.node:
        kept += before.get(node.output[0], [])
        kept += [] if id(node) in dropped else [node]
    del graph.node[:]
    graph.node.extend(kept)
    return made


def turns_matrix(node: onnx.NodeProto) -> bool:
    """Whether it makes the transpose of a matrix."""
    return node.op_type == "Transpose" and [list(a.ints) for a in node.attribute if a.name == "perm"] == [[1, 0]]


def multiplies_by(node: onnx.NodeProto, matrices: Collection[str]) -> bool:
    """Whether it is a product whose second factor, and not its first, is one of these."""
    return node.op_type == "MatMul" and node.input[1] in matrices and node.input[0] not in matrices
