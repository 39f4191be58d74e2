"""Gives attention of a step's own tokens, as a tower has it, to MultiHeadAttention, which never holds all scores."""

from __future__ import annotations

import functools

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
Shared = dict[str, gs.Variable]  # by mask, whether it hides nothing


def lower_whole_attention(graph: gs.Graph) -> Fused:
    """Rewrites every legal Attention without a cache, and names those that it leaves.

         q        k        v                      q   cos, sin   k       v
         |        |        |                       \\     |     /        |
     Transpose Transpose Transpose                [RotaryEmbedding] twice|
         |        |        |                        |      |             |
      [Rope]   [Rope]      |              =>        |      |  segments   |
         |        |        |                        |      |     |       |
        Attention ---------+- [mask]               [If it hides nothing]
         |                                          MultiHeadAttention
     Transpose                                     [else Attention]
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
    whole = gs.Node("MultiHeadAttention", name, said | {"num_heads": count}, rows, [y], "com.microsoft")
    if mask is None:
        graph.nodes[at:at] = [*before, whole]
        return
    if mask.name not in shared:
        shared[mask.name] = _of_one(mask, before)
    masked = gs.Node("Attention", f"{node.name}/masked", said | {"q_num_heads": count, "kv_num_heads": count})
    masked.inputs.extend([*rows, mask])
    branches = {"then_branch": _branch(whole, y), "else_branch": _branch(masked, y)}
    graph.nodes[at:at] = [*before, gs.Node("If", f"{node.name}/segments", branches, [shared[mask.name]], [y])]


def _branch(node: gs.Node, like: gs.Tensor) -> gs.Graph:
    made = gs.Variable(f"{node.name}/{like.name}", like.dtype, like.shape)
    node.outputs.clear()
    node.outputs.append(made)
    return gs.Graph([node], [], [made], name=node.name)


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
            if along in (1, -1) and len(keys.shape or ()) == 1:
                return
    raise Refusal("its mask may hide something of one segment")


def _of_one(mask: gs.Tensor, before: list[gs.Node]) -> gs.Variable:
    """Whether all keys are of the first query's segment, by the mask alone, as a layer that is cut out has no more."""
    added, first = Added(f"{mask.name}/whole"), [*mask.shape[:-2], 1, mask.shape[-1]]
    places = [added.constant(said, [n]) for said, n in (("begin", 0), ("end", 1), ("axis", -2))]
    row = added.node("Slice", "first", [mask, *places], np.bool_, first)
    numbers = added.node("Cast", "numbers", [row], np.int32, first, to=onnx.TensorProto.INT32)
    least = added.node("ReduceMin", "least", [numbers], np.int32, [], keepdims=0)
    one = added.node("Equal", "one", [least, added.constant("shown", 1, np.int32)], np.bool_, [])
    before.extend(added.nodes)
    return one
