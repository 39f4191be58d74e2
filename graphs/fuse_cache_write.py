"""Fuses QkNormRope with the two operators that write its keys and values into the slots of a cache."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from llmexport.graphs.fusion import Fused, Refusal, float_type, fuse_each, insert, is_output, producer, sole_consumer
from llmexport.plugins.spec import DOMAIN


def fuse_cache_write(graph: gs.Graph) -> Fused:
    """Rewrites every legal QkNormRope and its TensorScatters, and names those that it leaves.

        q, k, v, ...                                          q, k, v, ...  pasts  Cast(write_indices)
             |                                                      \\       |     /
         QkNormRope                                                QkNormRopeWrite
         /   |   \\                                      =>          /     |     \\
        | TensorScatter(past_key, write_indices)                  query   key   value
        |         | TensorScatter(past_value, write_indices)
      query  key  value

    Indices are cast to int32 once for all ops. Legal if
    1. a TensorScatter of linear mode along the slots, and nothing else, reads the op's key, and another its value,
    2. both are given the same indices,
    3. pasts are of the op's float type and of a known rank, and nothing else reads them,
    4. nothing reads query or a cache before all that the op then reads is made.
    """
    return fuse_each(graph, ("QkNormRope",), _fuse, where=lambda node: node.domain == DOMAIN)


def _fuse(graph: gs.Graph, op: gs.Node) -> None:
    query, *made = op.outputs
    scatters = [_scatter(graph, value, name) for value, name in zip(made, ("key", "value"), strict=True)]
    indices = [s.inputs[2] for s in scatters]
    if indices[0] is not indices[1]:
        raise Refusal("key and value are written from other slots on")
    pasts = [s.inputs[0] for s in scatters]
    for past in pasts:
        if float_type(past) != float_type(op.inputs[0]) or len(past.shape or ()) != 4:
            raise Refusal("its pasts are not [B, heads, S, D] of its float type")
        if len(past.outputs) > 1 or is_output(graph, past):
            raise Refusal("others read its pasts too")
    step, weights = op.inputs[:5], op.inputs[5:]
    caches = [s.outputs[0] for s in scatters]
    inputs = [*step, *pasts, _narrow(graph, indices[0]), *weights]
    early = "query or a cache is read before all that the op reads is made"
    insert(graph, "QkNormRopeWrite", f"{op.name}Write", dict(op.attrs), inputs, [query, *caches], early)


def _scatter(graph: gs.Graph, value: gs.Tensor, name: str) -> gs.Node:
    """The one TensorScatter that writes `value` into slots."""
    node = sole_consumer(value, name)
    if node.op != "TensorScatter" or node.domain or node.inputs[1] is not value or is_output(graph, value):
        raise Refusal(f"{name} is not only written into slots")
    if node.attrs.get("mode", "linear") != "linear" or node.attrs.get("axis", -2) not in (-2, 2):
        raise Refusal(f"{name} is written in a circle, or along another axis than the slots'")
    if len(node.inputs) < 3:
        raise Refusal(f"{name} is written from no slot that is said")
    return node


def _narrow(graph: gs.Graph, indices: gs.Tensor) -> gs.Tensor:
    """The indices in int32, as the op takes them; made once."""
    maker = producer(indices)
    name = f"{maker.name if maker else indices.name}/int32"
    for reader in indices.outputs:
        if reader.name == name:
            return reader.outputs[0]
    made = gs.Variable(name, np.int32, indices.shape)
    place = graph.nodes.index(maker) + 1 if maker else 0
    graph.nodes.insert(place, gs.Node("Cast", name, {"to": onnx.TensorProto.INT32}, [indices], [made]))
    return made
