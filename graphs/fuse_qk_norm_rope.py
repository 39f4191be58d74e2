"""Fuses what q, k and v of attention go through before a KV cache: norms, rotary embedding, heads before tokens."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from llmexport.graphs import rms_norm
from llmexport.graphs.fusion import (
    Added,
    Fused,
    Refusal,
    float_type,
    fuse_each,
    heads_behind_tokens,
    insert,
    is_output,
    produced_by,
)
from llmexport.graphs.rms_norm import RmsNorm
from llmexport.plugins.spec import DOMAIN


def fuse_qk_norm_rope(graph: gs.Graph) -> Fused:
    """Rewrites what is before every legal Attention or SinkAttention, and names those that it leaves.

         q         k         v
         |         |         |                q  k  v  cos  sin  [weights]
       [norm]    [norm]      |                 \\  \\  |   |   /   /
         |         |         |                     QkNormRope
     Transpose Transpose Transpose      =>         /   |   \\
         |         |         |                  query key value
       Rope      Rope        |
         |         |         |
       [norm]    [norm]      |
         |         |         |
       query      key      value

        both                     both
         |                      /    \\
       Split       =>   QkNormRope   Slice
       /   \\                            |
      q   gate                        gate

    The norms in brackets are taken where q and k both have one, before Rope or both after it, of one epsilon, offset
    and rounding, as `rms_norm.read` takes it; others before Rope stay where they are. Between query and attention there
    may be products and casts; between key and value and attention what joins them to the past. Of both, q is read where
    it lies if nothing else reads q, and the Split makes two parts of a last axis of known size. Legal if
    1. queries and keys are turned by one Rope each, by the same angles and in the same way,
    2. q, k and v are [B, T, heads, D] with heads turned to the front right before,
    3. they are of one float type, their heads known and of one size, as many of k as of v,
    4. nothing reads query, key or value before all of q, k, v, angles and weights are made.
    """
    fused = fuse_each(graph, ("Attention", "SinkAttention"), _fuse)
    for op in [n for n in graph.nodes if n.op == "QkNormRope" and n.domain == DOMAIN]:
        _read_beside(graph, op)
    return fused


@dataclass(frozen=True)
class Turned:
    """`rope` turns `source` [B, T, heads, D]; `before` and `after` are the norms around it that can be taken."""

    source: gs.Tensor
    rope: gs.Node
    before: RmsNorm | None
    after: RmsNorm | None


def _fuse(graph: gs.Graph, attention: gs.Node) -> None:
    queries, keys, values = attention.inputs[:3]
    q = _turned(graph, _unscaled(queries), "q")
    k = _turned(graph, _of_this_step(keys), "k")
    value = _of_this_step(values)
    v = _heads_last(value, "v")
    angles = q.rope.inputs[1:3]
    if any(a is not b for a, b in zip(angles, k.rope.inputs[1:3], strict=True)) or q.rope.attrs != k.rope.attrs:
        raise Refusal("q and k are turned by other angles or in another way")
    norms, first = (q.before, k.before), True
    if not _alike(*norms):
        norms, first = (q.after, k.after), False
    taken = [n for n in norms if n] if _alike(*norms) else []
    sources = [taken[0].source, taken[1].source] if taken and first else [q.source, k.source]
    made = [taken[0].y, taken[1].y] if taken and not first else [q.rope.outputs[0], k.rope.outputs[0]]
    _check_heads(*sources, v, *angles)
    attributes = {"epsilon": 0.0, "round_before_weight": 0, "weight_offset": 0.0}
    attributes |= taken[0].attributes if taken else {}
    attributes |= {"interleaved": int(q.rope.attrs["interleaved"]), "norm_first": int(first or not taken)}
    inputs = [*sources, v, *angles, *(n.weight for n in taken)]
    early = "query, key or value is read before all of q, k and v are made"
    insert(graph, "QkNormRope", f"{q.rope.name}/QkNormRope", attributes, inputs, [*made, value], early)


def _unscaled(queries: gs.Tensor) -> gs.Tensor:
    """Queries before what scales them, as a temperature does."""
    value = queries
    while rms_norm.norm_that_makes(value) is None:
        node = produced_by(value, "Cast") or produced_by(value, "Mul")
        if node is None:
            break
        value = node.inputs[0]
    return value


def _of_this_step(value: gs.Tensor) -> gs.Tensor:
    """Keys or values of this step, from those that attention reads."""
    scatter, concat = produced_by(value, "TensorScatter"), produced_by(value, "Concat")
    if scatter:
        return scatter.inputs[1]
    return concat.inputs[1] if concat and len(concat.inputs) == 2 and concat.attrs.get("axis") == 2 else value


def _turned(graph: gs.Graph, value: gs.Tensor, what: str) -> Turned:
    after = _norm(graph, value, what)
    rope = produced_by(after.source if after else value, "Rope", DOMAIN)
    if rope is None:
        raise Refusal(f"{what} is not turned by Rope")
    source = _heads_last(rope.inputs[0], what)
    return Turned(source, rope, _norm(graph, source, what), after)


def _norm(graph: gs.Graph, value: gs.Tensor, what: str) -> RmsNorm | None:
    """The norm whose result `value` is, if there is one that can be taken."""
    norm = rms_norm.norm_that_makes(value)
    if norm is None:
        return None
    try:
        found = rms_norm.read(graph, norm, what)
    except Refusal:
        # It stays a node of its own.
        return None
    return found if found.y is value else None


def _heads_last(value: gs.Tensor, what: str) -> gs.Tensor:
    """[B, T, heads, D] of [B, heads, T, D]."""
    source = heads_behind_tokens(value)
    if source is None:
        raise Refusal(f"{what} is not [B, T, heads, D] with its heads turned to the front")
    return source


def _alike(one: RmsNorm | None, other: RmsNorm | None) -> bool:
    return one is not None and other is not None and one.attributes == other.attributes


def _check_heads(q: gs.Tensor, k: gs.Tensor, v: gs.Tensor, *angles: gs.Tensor) -> None:
    kinds = {float_type(x) for x in (q, k, v, *angles)}
    if len(kinds) > 1 or "" in kinds:
        raise Refusal("q, k, v and the angles are not of one float type")
    heads = [list(x.shape or [])[2:] for x in (q, k, v)]
    known = all(len(h) == 2 and all(isinstance(n, int) for n in h) for h in heads)
    if not known or not isinstance(list(angles[0].shape or [None])[-1], int):
        raise Refusal("its heads are of a number or size that is not known")
    if heads[1] != heads[2] or heads[0][1] != heads[1][1]:
        raise Refusal(f"its heads of q, k and v are {', '.join(f'{n} of {d}' for n, d in heads)}")


def _read_beside(graph: gs.Graph, op: gs.Node) -> None:
    """Lets the op read q beside what a Split parts it from; the other part becomes a Slice."""
    q = op.inputs[0]
    split = produced_by(q, "Split")
    if split is None or split.attrs.get("axis", 0) not in (-1, 3) or len(q.outputs) > 1 or is_output(graph, q):
        return
    both, part = split.inputs[0], Added(split.name)
    is_first = len(split.outputs) == 2 and split.outputs[0] is q
    if not is_first or not isinstance(list(both.shape or [None])[-1], int):
        return
    op.inputs[0] = both
    bounds = [part.constant(n, [v]) for n, v in (("from", q.shape[-1]), ("to", both.shape[-1]), ("axis", -1))]
    split.op, split.attrs = "Slice", {}
    split.inputs, split.outputs = [both, *bounds], split.outputs[1:]
