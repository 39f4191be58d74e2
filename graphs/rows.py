"""Queries, keys and values as ONNX Runtime takes them: [B, T, H * D], the heads of a token side by side."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from llmexport.graphs.fusion import Refusal, heads_behind_tokens, is_output, produced_by, sole_consumer, turns_heads
from llmexport.plugins.spec import DOMAIN


def flattened(graph: gs.Graph, attention: gs.Node) -> list[gs.Node]:
    """The nodes that make [B, T, H * D] of what is attended, and are all that reads it: a Reshape, and before it the
    Transpose of an Attention, which has heads before tokens."""
    behind = [sole_consumer(attention.outputs[0], "what is attended")]
    if not attention.domain:
        if not turns_heads(behind[0]):
            raise Refusal("what is attended is not turned back")
        behind.append(sole_consumer(behind[0].outputs[0], "what is attended"))
    if behind[-1].op != "Reshape" or len(behind[-1].outputs[0].shape or ()) != 3:
        raise Refusal("the heads of what is attended are not put side by side")
    if any(is_output(graph, n.outputs[0]) for n in (attention, *behind[:-1])):
        raise Refusal("what is attended is a graph output")
    return behind


def as_rows(source: gs.Tensor, rope: gs.Node | None, before: list[gs.Node]) -> gs.Tensor:
    """[B, T, H, D] as rows, turned if there is a Rope; the nodes for that are added to `before`."""
    value = _side_by_side(source, before)
    return _turned(value, source, rope, before) if rope else value


def rows_of(value: gs.Tensor, what: str) -> tuple[gs.Tensor, gs.Node | None]:
    """The [B, T, H, D] whose heads were turned to the front, and the Rope that turns these, if one does."""
    rope = produced_by(value, "Rope", DOMAIN)
    source = heads_behind_tokens(rope.inputs[0] if rope else value)
    if source is None:
        raise Refusal(f"{what} is not [B, T, H, D] with its heads turned to the front")
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
