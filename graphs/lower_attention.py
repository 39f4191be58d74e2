"""Gives Attention heads side by side, and keys and values of the past apart, as ONNX Runtime computes it fastest."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from llmexport.graphs.causal import is_causal, past_of
from llmexport.graphs.fusion import Added, Fused, Refusal, float_type, fuse_each, is_read_before, produced_by, producer
from llmexport.graphs.grouped import TYPES, bias_of
from llmexport.graphs.rows import as_rows, flattened, heads_of

Beginning = tuple[gs.Variable, gs.Variable, gs.Variable, gs.Variable, gs.Variable]
Shared = dict[str, Beginning]  # by mask


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

    The slots of a window, which move up with each step, are a past as well. Where no row is shown any of them, as none
    holds a token yet, an If gives the keys of this step alone to GroupQueryAttention, which does not mask key by key
    what is behind a query. It is so where the graph tells that the mask is causal. Legal if
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
    if v.sizes[1] == k.sizes[1] and float_type(query) in TYPES and _moves_up(node.inputs[3], node.inputs[4]):
        _begin_apart(shared, graph, node)


def _moves_up(mask: gs.Tensor, past: gs.Tensor) -> bool:
    """Whether keys are joined to slots of a known number, and the mask shows none behind a query."""
    slots, length = (past.shape or [None] * 3)[2], past_of(mask)
    return isinstance(slots, int) and length is not None and not float_type(mask) and is_causal(mask, length, slots)


def _begin_apart(shared: Shared, graph: gs.Graph, node: gs.Node) -> None:
    """Puts an If around an Attention of rows, whose other branch is of steps that see none of the slots."""
    mask, at, added = node.inputs[3], graph.nodes.index(node), Added(f"{node.name}/beginning")
    dtype = np.dtype(node.inputs[0].dtype)
    before: list[gs.Node] = []
    if mask.name not in shared:
        shared[mask.name] = _beginning(mask, node.inputs[4].shape[2], dtype, before)
    begins, bias, tokens, last, total = shared[mask.name]
    # Of a computed length, as ONNX Runtime believes that a present is as long as a past whose length it knows.
    none = added.node("Sub", "none", [tokens, tokens], np.int64, [1])
    places = added.constant("first", [0]), none, added.constant("axis", [2])
    pasts = node.inputs[4:6]
    empty = [
        added.node("Slice", f"past_{i}", [p, *places], p.dtype, [*p.shape[:2], f"{added.name}/{i}", p.shape[3]])
        for i, p in enumerate(pasts)
    ]
    ends, absent = [*node.outputs], [gs.Variable.empty() for _ in range(3)]
    said = {n: v for n, v in node.attrs.items() if n in ("scale", "softcap")}
    said |= {"num_heads": node.attrs["q_num_heads"], "kv_num_heads": node.attrs["kv_num_heads"]}
    attended = gs.Variable(f"{added.name}/{ends[0].name}", ends[0].dtype, ends[0].shape)
    new = [gs.Variable(f"{added.name}/new_{i}", p.dtype, [*p.shape[:2], None, p.shape[3]]) for i, p in enumerate(pasts)]
    inputs = [*node.inputs[:3], *empty, last, total, *absent, bias]
    added.nodes.append(gs.Node("GroupQueryAttention", added.name, said, inputs, [attended, *new], "com.microsoft"))
    joined = [
        added.node("Concat", end.name, [past, value], end.dtype, end.shape, axis=2)
        for end, past, value in zip(ends[1:], pasts, new, strict=True)
    ]
    made = [gs.Variable(f"{node.name}/all/{v.name}", v.dtype, v.shape) for v in ends]
    goes_on = gs.Node(node.op, f"{node.name}/all", node.attrs, [*node.inputs], made)
    branches = {
        "then_branch": gs.Graph(added.nodes, [], [attended, *joined], name=added.name),
        "else_branch": gs.Graph([goes_on], [], made, name=goes_on.name),
    }
    node.inputs.clear()
    node.outputs.clear()
    chosen = gs.Node("If", f"{node.name}/slots", branches, [begins], ends)
    graph.nodes[at : at + 1] = [*before, chosen]


def _beginning(mask: gs.Tensor, slots: int, dtype: np.dtype[Any], before: list[gs.Node]) -> Beginning:
    """For all layers: whether the first query of no row sees a slot, and no later one then; and, if so, the mask of
    this step's keys as a bias, how many tokens there are, each row's last key, and how many keys."""
    added, batch = Added(f"{mask.name}/beginning"), mask.shape[0]
    add, nothing, hides = added.node, Added(f"{added.name}/goes_on"), Added(f"{added.name}/hides")
    axes = added.constant("axes", [2, 3])
    places = added.constant("first", [0, 0]), added.constant("behind", [1, slots]), axes
    shown = add("Slice", "shown", [mask, *places], np.bool_, [batch, 1, 1, slots])
    number = add("Cast", "shown/number", [shown], np.int32, [batch, 1, 1, slots], to=onnx.TensorProto.INT32)
    most = add("ReduceMax", "shown/most", [number], np.int32, [], keepdims=0)
    begins = add("Equal", "begins", [most, added.constant("none", 0, np.int32)], np.bool_, [])
    tokens = add("Shape", "tokens", [mask], np.int64, [1], start=2, end=3)
    total = add("Cast", "total", [tokens], np.int32, [1], to=onnx.TensorProto.INT32)
    rows = add("Shape", "rows", [mask], np.int64, [1], start=0, end=1)
    token = add("Sub", "last/one", [total, added.constant("token", [1], np.int32)], np.int32, [1])
    last = add("Expand", "last", [token, rows], np.int32, [batch])
    own = hides.constant("slots", [slots]), hides.constant("end", [np.iinfo(np.int64).max]), hides.constant("axis", [3])
    seen = hides.node("Slice", "seen", [mask, *own], np.bool_, [*mask.shape[:3], f"{added.name}/tokens"])
    made = bias_of(hides, seen, dtype)
    sizes, zero = nothing.constant("sizes", [0, 0, 0, 0]), gs.Constant(f"{nothing.name}/zero", np.zeros(1, dtype))
    none = nothing.node("ConstantOfShape", "bias", [sizes], dtype.type, [0, 0, 0, 0], value=zero)
    branches = {
        "then_branch": gs.Graph(hides.nodes, [], [made], name=hides.name),
        "else_branch": gs.Graph(nothing.nodes, [], [none], name=nothing.name),
    }
    bias = add("If", "bias", [begins], dtype.type, [*made.shape], **branches)
    before.extend(added.nodes)
    return begins, bias, tokens, last, total


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
