"""Steps that see no slot of a window's cache, as no text has begun: their own keys are all that there is to read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from llmexport.graphs.fusion import Added
from llmexport.graphs.grouped import bias_of, unread


@dataclass(frozen=True)
class Beginning:
    """What all layers of a mask read: whether no query sees a slot, and if so, the mask of the step's keys as a bias,
    how many tokens and keys there are, and each row's last key."""

    begins: gs.Variable
    bias: gs.Variable
    tokens: gs.Variable
    total: gs.Variable
    last: gs.Variable


Shared = dict[str, Beginning]  # by mask


def begin_apart(shared: Shared, graph: gs.Graph, node: gs.Node) -> None:
    """Puts an If around an Attention of rows that joins keys to slots, under a mask that is causal.

        q, k, v, mask, pasts              If no query sees a slot
                |                         |   GroupQueryAttention of q, k, v - mask of this step's keys
            Attention              =>     |   Concat twice - pasts
            /       \\                      | else
           y      presents                |   Attention
                                          y, presents

    Both multiply each query with each key, of which there are fewer then; GroupQueryAttention does not mask one by one
    what is behind a query.
    """
    mask, at, added = node.inputs[3], graph.nodes.index(node), Added(f"{node.name}/beginning")
    before: list[gs.Node] = []
    if mask.name not in shared:
        shared[mask.name] = _beginning(mask, node.inputs[4].shape[2], np.dtype(node.inputs[0].dtype), before)
    step = shared[mask.name]
    # Of a computed length, as ONNX Runtime believes that a present is as long as a past whose length it knows.
    none = added.node("Sub", "none", [step.tokens, step.tokens], np.int64, [1])
    places = added.constant("first", [0]), none, added.constant("axis", [2])
    ends, pasts, absent = [*node.outputs], node.inputs[4:6], [gs.Variable.empty() for _ in range(3)]
    empty = [
        added.node("Slice", f"past_{i}", [p, *places], p.dtype, [*p.shape[:2], f"{added.name}/{i}", p.shape[3]])
        for i, p in enumerate(pasts)
    ]
    said = {n: v for n, v in node.attrs.items() if n in ("scale", "softcap")}
    said |= {"num_heads": node.attrs["q_num_heads"], "kv_num_heads": node.attrs["kv_num_heads"]}
    attended = gs.Variable(f"{added.name}/{ends[0].name}", ends[0].dtype, ends[0].shape)
    new = [gs.Variable(f"{added.name}/new_{i}", p.dtype, [*p.shape[:2], None, p.shape[3]]) for i, p in enumerate(pasts)]
    inputs = [*node.inputs[:3], *empty, step.last, step.total, *absent, step.bias]
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
    graph.nodes[at : at + 1] = [*before, gs.Node("If", f"{node.name}/slots", branches, [step.begins], ends)]


def _beginning(mask: gs.Tensor, slots: int, dtype: np.dtype[Any], before: list[gs.Node]) -> Beginning:
    added, hides = Added(f"{mask.name}/beginning"), Added(f"{mask.name}/begins")
    add, batch, axis = added.node, mask.shape[0], added.constant("axis", [3])
    past = [*mask.shape[:3], slots]
    shown = add(
        "Slice", "shown", [mask, added.constant("first", [0]), added.constant("slots", [slots]), axis], bool, past
    )
    number = add("Cast", "shown/number", [shown], np.int32, past, to=onnx.TensorProto.INT32)
    most = add("ReduceMax", "shown/most", [number], np.int32, [], keepdims=0)
    begins = add("Equal", "begins", [most, added.constant("none", 0, np.int32)], np.bool_, [])
    tokens = add("Shape", "tokens", [mask], np.int64, [1], start=2, end=3)
    rows = add("Shape", "rows", [mask], np.int64, [1], start=0, end=1)
    before_end = add("Sub", "last/wide", [tokens, added.constant("token", [1])], np.int64, [1])
    one = add("Cast", "last/one", [before_end], np.int32, [1], to=onnx.TensorProto.INT32)
    # Of a Cast that branches alone read ONNX Runtime warns that it keeps it.
    total = add("Add", "total", [one, added.constant("token/narrow", [1], np.int32)], np.int32, [1])
    last = add("Expand", "last", [one, rows], np.int32, [batch])
    places = (
        hides.constant("slots", [slots]),
        hides.constant("end", [np.iinfo(np.int64).max]),
        hides.constant("axis", [3]),
    )
    own = hides.node("Slice", "own", [mask, *places], np.bool_, [*mask.shape[:3], f"{added.name}/tokens"])
    made = bias_of(hides, own, dtype)
    branches = {
        "then_branch": gs.Graph(hides.nodes, [], [made], name=hides.name),
        "else_branch": unread(f"{mask.name}/goes_on", dtype),
    }
    bias = add("If", "bias", [begins], dtype.type, [*made.shape], **branches)
    before.extend(added.nodes)
    return Beginning(begins, bias, tokens, total, last)
