"""Queries, keys and values as ONNX Runtime takes them: [B, T, H * D], the heads of a token side by side."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from llmexport.graphs.fusion import (
    HEADS_FIRST,
    Refusal,
    heads_behind_tokens,
    is_output,
    produced_by,
    sole_consumer,
    turns_heads,
)
from llmexport.plugins.spec import DOMAIN


@dataclass(frozen=True)
class Heads:
    """q, k or v: `source` [B, T, H, D], or [B, H, T, D] where heads are `first`, and the Rope that turns it, if one
    does."""

    source: gs.Tensor
    rope: gs.Node | None = None
    first: bool = False

    @property
    def sizes(self) -> tuple[int, int]:
        """How many heads, and of what size."""
        shape = self.source.shape
        return shape[1 if self.first else 2], shape[3]


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


def as_rows(heads: Heads, before: list[gs.Node]) -> gs.Tensor:
    """[B, T, H * D]; the nodes for that are added to `before`."""
    source = heads.source
    if heads.first:
        shape = [source.shape[i] for i in HEADS_FIRST]
        source = gs.Variable(f"{source.name}/turned_back", source.dtype, shape)
        before.append(gs.Node("Transpose", source.name, {"perm": HEADS_FIRST}, [heads.source], [source]))
    value = _side_by_side(source, before)
    return _turned(value, source, heads.rope, before) if heads.rope else value


def heads_of(value: gs.Tensor, what: str) -> Heads:
    """Those that were turned to the front, and by Rope after that or not at all; or the value itself, if something else
    made it."""
    rope = produced_by(value, "Rope", DOMAIN)
    source = heads_behind_tokens(rope.inputs[0] if rope else value)
    heads = Heads(value, first=True) if source is None else Heads(source, rope)
    if len(heads.source.shape or ()) != 4 or not all(isinstance(n, int) for n in heads.sizes):
        raise Refusal(f"{what} has heads of a number or size that is not known")
    return heads


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
