"""Gives Attention heads side by side, and keys and values of the past apart, as ONNX Runtime computes it fastest."""

from __future__ import annotations

import functools

import onnx_graphsurgeon as gs

from llmexport.graphs.beginning import Shared, begin_apart
from llmexport.graphs.causal import is_causal, past_of
from llmexport.graphs.fusion import Fused, Refusal, float_type, fuse_each, is_read_before, produced_by, producer
from llmexport.graphs.grouped import MULTIPLE, TYPES
from llmexport.graphs.rows import as_rows, flattened, heads_of


def lower_attention(graph: gs.Graph) -> Fused:
    """Rewrites every legal Attention of a dynamic cache, and names those that it leaves.

         q        k        v
         |        |        |                      q   cos, sin   k        v
     Transpose Transpose Transpose                 \\     |     /         |
         |        |        |                  [RotaryEmbedding] twice     |
      [Rope]   [Rope]      |                        |      |              |
         |        |        |                        |      |   mask, pasts |
         |     Concat   Concat - past     =>        |      |      |       |
         |        |        |                       Attention (rows) ------+
        Attention ---------+                        |      |
         |                                          y   presents
     Transpose
         |
      Reshape - y

    The slots of a window, which move up with each step, are a past as well. Where the graph tells that the mask is
    causal, a step that is shown none, as none holds a token yet, is another operator's: see begin_apart. Legal if
    1. heads of q, k and v are of a known number and size; Rope alone stands between what turns them to the front and
       Attention, of q and k, or they are turned back,
    2. keys and values are the past and these, in this order, and nothing else reads them before,
    3. what is attended is read once, and turned back to [B, T, H * D].
    """
    return fuse_each(graph, ("Attention",), functools.partial(_lower, {}))


def _lower(shared: Shared, graph: gs.Graph, node: gs.Node) -> None:
    if len(node.inputs) > 4 or len(node.outputs) > 1:
        raise Refusal("it has more than queries, keys, values and a mask")
    query, mask = node.inputs[0], node.inputs[3:] or [gs.Variable.empty()]
    joined = [_joined(graph, node, node.inputs[i], what) for i, what in ((1, "keys"), (2, "values"))]
    apart = zip((query, *(c.inputs[1] for c in joined)), ("q", "k", "v"), strict=True)
    q, k, v = heads = [heads_of(value, what) for value, what in apart]
    if v.rope:
        raise Refusal("its values are turned by Rope")
    behind = flattened(graph, node)
    at = graph.nodes.index(node)
    before: list[gs.Node] = []
    inputs = [as_rows(its, before) for its in heads]
    inputs += [*mask, *(c.inputs[0] for c in joined)]
    outputs = [behind[-1].outputs[0], *(c.outputs[0] for c in joined)]
    for dead in (*behind, node, *joined):
        dead.inputs.clear()
        dead.outputs.clear()
    node.attrs |= {"q_num_heads": q.sizes[0], "kv_num_heads": k.sizes[0]}
    node.inputs.extend(inputs)
    node.outputs.extend(outputs)
    graph.nodes[at:at] = before
    grouped = v.sizes[1] == k.sizes[1] and not k.sizes[1] % MULTIPLE and float_type(query) in TYPES
    if grouped and _moves_up(node.inputs[3], node.inputs[4]):
        begin_apart(shared, graph, node)


def _moves_up(mask: gs.Tensor, past: gs.Tensor) -> bool:
    """Whether keys are joined to slots of a known number, and the mask shows none behind a query."""
    slots, length = (past.shape or [None] * 3)[2], past_of(mask)
    return isinstance(slots, int) and length is not None and not float_type(mask) and is_causal(mask, length, slots)


def _joined(graph: gs.Graph, attention: gs.Node, value: gs.Tensor, what: str) -> gs.Node:
    """The Concat of what is past and what is new."""
    node = produced_by(value, "Concat")
    if node is None or len(node.inputs) != 2 or node.attrs.get("axis") != 2:
        raise Refusal(f"its {what} are not those of the past and of this step")
    if producer(node.inputs[0]) or isinstance(node.inputs[0], gs.Constant):
        raise Refusal(f"the {what} of the past are no input")
    if is_read_before(graph, attention, value):
        raise Refusal(f"its {what} are read before")
    return node
