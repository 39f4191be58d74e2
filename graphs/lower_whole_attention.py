"""Gives attention of a step's own tokens, as a tower has it, to MultiHeadAttention, which never holds all scores."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from llmexport.graphs.fusion import (
    Added,
    Fused,
    Refusal,
    float_type,
    fuse_each,
    heads_behind_tokens,
    produced_by,
    scalar,
)
from llmexport.graphs.rows import as_rows, flattened, heads_of
from llmexport.plugins.spec import DOMAIN

FLOAT = "float32"  # that ONNX Runtime has the operator in on a CPU
NOTHING = ("is_causal", "softcap", "qk_matmul_output_mode")  # attributes that say nothing


@dataclass(frozen=True)
class Segments:
    """Where segments of tokens begin and end, how many there are, and whether the tokens of each follow each other."""

    begins: gs.Variable
    ends: gs.Variable
    count: gs.Variable
    apart: gs.Variable


Shared = dict[str, Segments]  # by mask


def lower_whole_attention(graph: gs.Graph) -> Fused:
    """Rewrites every legal Attention without a cache, and names those that it leaves.

         q        k        v                      q   cos, sin   k       v
         |        |        |                       \\     |     /        |
     Transpose Transpose Transpose                [RotaryEmbedding] twice|
         |        |        |                        |      |             |
      [Rope]   [Rope]      |              =>        |      |    mask     |
         |        |        |                        |      |     |       |
        Attention ---------+- [mask]                MultiHeadAttention [Loop over segments,
         |                                          |                   if their tokens follow each other,
     Transpose                                      |                   else Attention]
         |                                          |
      Reshape - y                                   y

    Attention makes the scores of all pairs, of 4096 patches with 16 heads a GB, and MultiHeadAttention those of some
    queries and keys at a time, where it is told no mask. Legal if
    1. heads of q, k and v are of a known number and size, as many of each; Rope alone stands between what turns them to
       the front and Attention, of q and k,
    2. no mask is there, or one that compares the segments of queries and keys,
    3. they are in fp32, and no score is capped,
    4. what is attended is read once, and turned back to [B, T, H * D].
    """
    return fuse_each(graph, ("Attention",), functools.partial(_lower, {}), where=_reads_its_own)


def _reads_its_own(node: gs.Node) -> bool:
    """Whether keys are those of the step, and no past's."""
    keys = node.inputs[1]
    rope = produced_by(keys, "Rope", DOMAIN)
    return len(node.inputs) < 5 and heads_behind_tokens(rope.inputs[0] if rope else keys) is not None


def _lower(shared: Shared, graph: gs.Graph, node: gs.Node) -> None:
    heads = [heads_of(value, what) for value, what in zip(node.inputs, "qkv", strict=False)]
    if heads[2].rope:
        raise Refusal("its values are turned by Rope")
    if len({h.sizes[0] for h in heads}) > 1:
        raise Refusal("it has fewer heads of keys than of queries")
    if any(node.attrs.get(name) for name in NOTHING) or len(node.outputs) > 1:
        raise Refusal("its scores are capped, masked or read")
    if (kind := float_type(node.inputs[0])) != FLOAT:
        raise Refusal(f"it is of {kind or 'no float type'}, not of {FLOAT}")
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    if mask is not None:
        _check_segments(mask)
    behind = flattened(graph, node)
    at, before, [y] = graph.nodes.index(node), list[gs.Node](), behind[-1].outputs
    rows = [as_rows(its, before) for its in heads]
    said = {n: a for n, a in node.attrs.items() if n == "scale"}
    for dead in (*behind, node):
        dead.inputs.clear()
        dead.outputs.clear()
    count, name = heads[0].sizes[0], f"{node.name}/whole"
    if mask is None:
        whole = gs.Node("MultiHeadAttention", name, said | {"num_heads": count}, rows, [y], "com.microsoft")
        graph.nodes[at:at] = [*before, whole]
        return
    if mask.name not in shared:
        shared[mask.name] = _of_mask(mask, before)
    attended = gs.Variable(f"{node.name}/masked", y.dtype, y.shape)
    heads_said = {"q_num_heads": count, "kv_num_heads": count}
    masked = gs.Node("Attention", attended.name, said | heads_said, [*rows, mask], [attended])
    branches = {
        "then_branch": _by_segment(name, said | {"num_heads": count}, rows, shared[mask.name]),
        "else_branch": gs.Graph([masked], [], [attended], name=masked.name),
    }
    graph.nodes[at:at] = [*before, gs.Node("If", f"{node.name}/segments", branches, [shared[mask.name].apart], [y])]


def _by_segment(name: str, said: dict[str, Any], rows: list[gs.Tensor], segments: Segments) -> gs.Graph:
    """A branch that attends to a segment at a time, and joins them. said: the operator's attributes."""
    added, turn, like = Added(name), Added(f"{name}/turn"), rows[0]
    batch, _, width = like.shape
    number = gs.Variable(f"{turn.name}/number", np.int64, [])
    going, goes_on = (gs.Variable(f"{turn.name}/{which}", np.bool_, []) for which in ("going", "goes_on"))
    before = gs.Variable(f"{turn.name}/before", like.dtype, [batch, f"{turn.name}/done", width])
    at = turn.node("Unsqueeze", "at", [number, turn.constant("first", [0])], np.int64, [1])
    ends = ("begin", segments.begins), ("end", segments.ends)
    places = [turn.node("Gather", which, [of, at], np.int64, [1]) for which, of in ends]
    places.append(turn.constant("axis", [1]))
    own = [batch, f"{turn.name}/tokens", width]
    some = [turn.node("Slice", f"own_{i}", [its, *places], like.dtype, own) for i, its in enumerate(rows)]
    attended = turn.node("MultiHeadAttention", "attended", some, like.dtype, own, **said)
    turn.nodes[-1].domain = "com.microsoft"
    joined = turn.node("Concat", "joined", [before, attended], like.dtype, [batch, f"{turn.name}/more", width], axis=1)
    turn.nodes.append(gs.Node("Identity", goes_on.name, {}, [going], [goes_on]))
    body = gs.Graph(turn.nodes, [number, going, before], [goes_on, joined], name=turn.name)
    nothing = [added.constant(which, [n]) for which, n in (("from", 0), ("to", 0), ("axis", 1))]
    empty = added.node("Slice", "empty", [like, *nothing], like.dtype, [batch, 0, width])
    always = added.constant("always", True, np.bool_)
    made = added.node("Loop", "joined", [segments.count, always, empty], like.dtype, [*like.shape], body=body)
    return gs.Graph(added.nodes, [], [made], name=added.name)


def _check_segments(mask: gs.Tensor) -> None:
    """Raises Refusal on a mask that is none of equal segments of queries and keys."""
    made: gs.Tensor = mask
    while node := produced_by(made, "Unsqueeze"):
        made = node.inputs[0]
    compared = produced_by(made, "Equal")
    if compared is not None:
        for queries, keys in (compared.inputs, compared.inputs[::-1]):
            turned = produced_by(queries, "Unsqueeze")
            along = turned is not None and turned.inputs[0] is keys and scalar(turned.inputs[1])
            if along in (1, -1) and len(keys.shape or ()) == 1 and {*mask.shape[:-2]} <= {1}:
                return
    raise Refusal("its mask may hide something of one segment")


def _of_mask(mask: gs.Tensor, before: list[gs.Node]) -> Segments:
    """By the mask alone, as a layer that is cut out has no more: a segment begins where a query is its first key."""
    added, tokens, number = Added(f"{mask.name}/whole"), mask.shape[-1], np.int64
    add, ends_at = added.node, {n: added.constant(f"at_{n}", [n]) for n in (-1, 0, 1)}
    last = added.constant("last", [np.iinfo(np.int64).max])
    # Of this type ArgMax finds the first of equal ones without numbers of 8 bytes for all pairs.
    narrow = add("Cast", "shown", [mask], np.uint8, [*mask.shape], to=onnx.TensorProto.UINT8)
    found = add("ArgMax", "first/of_all", [narrow], number, [*mask.shape[:-1]], axis=-1, keepdims=0)
    first = add("Reshape", "first", [found, ends_at[-1]], number, [tokens])
    size = add("Shape", "tokens", [first], number, [1])
    count = add("Squeeze", "tokens/count", [size], number, [])
    counted = [added.constant("none", 0), count, added.constant("step", 1)]
    own = add("Equal", "own", [first, add("Range", "numbers", counted, number, [tokens])], np.bool_, [tokens])
    places = add("NonZero", "begins/rows", [own], number, [1, f"{added.name}/segments"])
    begins = add("Squeeze", "begins", [places, ends_at[0]], number, [f"{added.name}/segments"])
    later = add("Slice", "begins/later", [begins, ends_at[1], last, ends_at[0]], number, [f"{added.name}/later"])
    ends = add("Concat", "ends", [later, size], number, [f"{added.name}/segments"], axis=0)
    segments = add("Squeeze", "segments", [add("Shape", "segments/1", [begins], number, [1])], number, [])
    pairs = [
        add("Slice", said, [first, at, to, ends_at[0]], number, [f"{added.name}/pairs"])
        for said, at, to in (("next", ends_at[1], last), ("before", ends_at[0], ends_at[-1]))
    ]
    backwards = add("Less", "goes_back", pairs, np.bool_, [f"{added.name}/pairs"])
    numbers = add("Cast", "back", [backwards], np.int32, [f"{added.name}/pairs"], to=onnx.TensorProto.INT32)
    backs = add("ReduceSum", "backs", [numbers], np.int32, [], keepdims=0)
    apart = add("Equal", "apart", [backs, added.constant("never", 0, np.int32)], np.bool_, [])
    before.extend(added.nodes)
    return Segments(begins, ends, segments, apart)
