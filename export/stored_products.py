"""Products that read a matrix as it is stored: FusedMatMul of com.microsoft, which ONNX Runtime has."""

from __future__ import annotations

from collections.abc import Collection

import onnx
from onnx.helper import make_node

from llmexport.export.packed.bind import multiplies_by, turns_matrix
from llmexport.export.packed.nbits import DOMAIN
from llmexport.graphs.cut import readers_of

OP = "FusedMatMul"
RANK = 3  # of what is multiplied: of a matrix and its bias ONNX Runtime makes a Gemm


def read_as_stored(graph: onnx.GraphProto, weights: Collection[str]) -> None:
    """Gives products of [B, T, in] by the transpose of a weight [out, in] the weight itself, in place.

    ONNX Runtime packs a constant factor when it opens a file, and turns it on the way: the transpose would be another
    copy, made before. A weight whose transpose anything else reads is left.
    """
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in (*graph.input, *graph.value_info)}
    readers = readers_of(graph.node)
    given = {o.name for o in graph.output}
    kept = []
    for node in graph.node:
        turned = node.output[0]
        reads_weight = turns_matrix(node) and node.input[0] in weights and turned not in given
        products = readers[turned] if reads_weight else []
        if not products or not all(multiplies_by(p, {turned}) and ranks.get(p.input[0]) == RANK for p in products):
            kept.append(node)
            continue
        for product in products:
            names = [product.input[0], node.input[0]], list(product.output), product.name
            product.CopyFrom(make_node(OP, *names, domain=DOMAIN, transB=1))
    del graph.node[:]
    graph.node.extend(kept)
