"""Gives Attention heads side by side, and keys and values of the past apart, as ONNX Runtime computes it fastest."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from llmexport.graphs.fusion import Fused, Refusal, fuse_each, is_output, produced_by, producer, sole_consumer
from llmexport.plugins.spec import DOMAIN

HEADS_FIRST = [0, 2, 1, 3]


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

    Legal if
    1. q, k and v are [B, T, H, D] with heads turned to the front, q and k by Rope after that or not at all,
    2. keys and values are the past and these, in this order, and nothing else reads them before,
    3. what is attended is read once, and turned back to [B, T, H * D].
    """
    return fuse_each(graph, ("Attention",), _lower)


def _lower(graph: gs.Graph, node: gs.Node) -> None:
    if len(node.inputs) > 4 or len(node.outputs) > 1:
        raise Refusal("it has more than queries, keys, values and a mask")
    query, mask = node.inputs[0], node.inputs[3:] or [gs.Variable.empty()]
    joined = [_joined(graph, node, node.inputs[i], what) for i, what in ((1, "keys"), (2, "values"))]
    apart = zip((query, *(c.inputs[1] for c in joined)), ("q", "k", "v"), strict=True)
    rows = [_rows(value, what) for value, what in apart]
    if rows[2][1]:
        raise Refusal("its values are turned by Rope")
    turned = sole_consumer(node.outputs[0], "what is attended")
    if turned.op != "Transpose" or list(turned.attrs.get("perm", ())) != HEADS_FIRST:
        raise Refusal("what is attended is not turned back")
    flat = sole_consumer(turned.outputs[0], "what is attended")
    if flat.op != "Reshape" or len(flat.outputs[0].shape or ()) != 3:
        raise Refusal("the heads of what is attended are not put side by side")
    if any(is_output(graph, n.outputs[0]) for n in (node, turned)):
        raise Refusal("what is attended is a graph output")
    at = graph.nodes.index(node)
    inputs: list[gs.Tensor] = []
    before: list[gs.Node] = []
    for source, rope in rows:
        value = _side_by_side(source, before)
        inputs.append(_turned(value, source, rope, before) if rope else value)
    inputs += [*mask, *(c.inputs[0] for c in joined)]
    outputs = [flat.outputs[0], *(c.outputs[0] for c in joined)]
    for dead in (turned, flat, node, *joined):
        dead.inputs.clear()
        dead.outputs.clear()
    node.attrs |= {"q_num_heads": rows[0][0].shape[2], "kv_num_heads": rows[1][0].shape[2]}
    node.inputs.extend(inputs)
    node.outputs.extend(outputs)
    graph.nodes[at:at] = before


def _joined(graph: gs.Graph, attention: gs.Node, value: gs.Tensor, what: str) -> gs.Node:
    """The Concat of what is past and what is new."""
    node = produced_by(value, "Concat")
    if node is None or len(node.inputs) != 2 or node.attrs.get("axis") != 2:
        raise Refusal(f"its {what} are not those of the past and of this step")
    if producer(node.inputs[0]) or isinstance(node.inputs[0], gs.Constant):
        raise Refusal(f"the {what} of the past are no input")
    place = graph.nodes.index(attention)
    if any(graph.nodes.index(reader) < place for reader in value.outputs if reader is not attention):
        raise Refusal(f"its {what} are read before")
    return node


def _rows(value: gs.Tensor, what: str) -> tuple[gs.Tensor, gs.Node | None]:
    """The [B, T, H, D] whose heads were turned to the front, and the Rope that turns these, if one does."""
    rope = producer(value)
    if rope is None or rope.domain != DOMAIN or rope.op != "Rope":
        rope = None
    turned = produced_by(rope.inputs[0] if rope else value, "Transpose")
    if turned is None or list(turned.attrs.get("perm", ())) != HEADS_FIRST:
        raise Refusal(f"{what} is not [B, T, H, D] with its heads turned to the front")
    source = turned.inputs[0]
    if not all(isinstance(n, int) for n in (source.shape or [None] * 4)[2:]):
        raise Refusal(f"{what} has heads of a number or size that is not known")
    return source, rope


def _side_by_side(source: gs.Tensor, before: list[gs.Node]) -> gs.Tensor:
    """[B, T, H, D] as [B, T, H * D]: what it was made of, or a Reshape."""
    width = source.shape[2] * source.shape[3]
    made = produced_by(source, "Reshape")
    if made is not None and list(made.inputs[0].shape or ())[2:] == [width] and len(made.inputs[0].shape) == 3:
        return made.inputs[0]
    shape = gs.Constant(f"{source.name}/rows_shape", np.array([0, 0, width], np.int64))
    return _node(before, "Reshape", f"{source.name}/rows", [source, shape], source, {})


def _turned(value: gs.Tensor, source: gs.Tensor, rope: gs.Node, before: list[gs.Node]) -> gs.Tensor:
    _, _, heads, size = source.shape
    cos, sin = rope.inputs[1:3]
    rotated = 2 * cos.shape[-1]
    attributes = {
        "interleaved": int(rope.attrs["interleaved"]),
        "num_heads": heads,
        "rotary_embedding_dim": rotated % size,
    }
    return _node(before, "RotaryEmbedding", f"{rope.name}/rows", [value, cos, sin], source, attributes)


def _node(
    before: list[gs.Node], op: str, name: str, inputs: list[gs.Tensor], like: gs.Tensor, attributes: dict[str, int]
) -> gs.Tensor:
    """What a new node gives: rows of the type and length of `like`."""
    made = gs.Variable(name, like.dtype, [*like.shape[:2], like.shape[2] * like.shape[3]])
    before.append(gs.Node(op, name, attributes, inputs, [made]))
    return made
