"""Attention by GroupQueryAttention of com.microsoft, which reads the slots that are written and no others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from llmexport.graphs.fusion import Added, Refusal, float_type
from llmexport.graphs.rows import Heads, as_rows, flattened, heads_of

TYPES = ("float32", "float16")  # that ONNX Runtime has attention and its products in on a CPU
MULTIPLE = 8  # of which sizes of heads are that it takes
PASTS, OF_ALL_ROWS = (3, 4), (6, 11)  # of its inputs; the latter are how many keys there are, and the sinks


@dataclass(frozen=True)
class Form:
    """An attention over slots: q, k and v; the nodes that write keys and values; and those behind it that make
    [B, T, H * D] of what is attended."""

    heads: list[Heads]
    writes: Sequence[gs.Node]
    behind: Sequence[gs.Node]


@dataclass(frozen=True)
class Step:
    """What all layers of a kind read: each row's last key, how many keys there are, whether GroupQueryAttention takes
    the step, and a bias over the keys. `bare`: whether it takes it without that bias, which hides nothing then and may
    be empty; None where nobody can tell. `joined`: how many keys and tokens there are, where these are joined to the
    slots."""

    last: gs.Variable
    total: gs.Variable
    can: gs.Variable
    bias: gs.Variable
    bare: gs.Variable | None = None
    joined: tuple[gs.Variable, gs.Variable] | None = None


def form_of(graph: gs.Graph, node: gs.Node, writes: Sequence[gs.Node]) -> Form:
    """That of an attention whose keys and values `writes` put behind the past. Raises Refusal on other forms."""
    apart = zip((node.inputs[0], *(w.inputs[1] for w in writes)), ("q", "k", "v"), strict=True)
    heads = [heads_of(value, what) for value, what in apart]
    if heads[2].rope:
        raise Refusal("its values are turned by Rope")
    if len({size for _, size in (h.sizes for h in heads)}) > 1:
        raise Refusal("its values have heads of another size than its keys")
    if (size := heads[0].sizes[1]) % MULTIPLE:
        raise Refusal(f"its heads are of size {size}, which is no multiple of {MULTIPLE}")
    if (kind := float_type(node.inputs[0])) not in TYPES:
        raise Refusal(f"it is of {kind or 'no float type'}, not of {' or '.join(TYPES)}")
    return Form(heads, writes, flattened(graph, node))


def bias_of(added: Added, seen: gs.Tensor, dtype: np.dtype[Any], tokens: gs.Tensor | None = None) -> gs.Variable:
    """The bias that hides what is not seen; tokens: how many there are, where `seen` [B, 1, 1, S] is all tokens'."""
    shown, nothing = (added.constant(said, value, dtype) for said, value in (("shown", 0.0), ("hidden", -np.inf)))
    shape = list(seen.shape)
    if tokens is not None:
        column = added.node("Concat", "column", [tokens, added.constant("one", [1])], np.int64, [2], axis=0)
        shape[2] = f"{added.name}/tokens"
        shown = added.node("Expand", "all_shown", [shown, column], dtype.type, [shape[2], 1])
    return added.node("Where", "bias", [seen, shown, nothing], dtype.type, shape)


def takes(added: Added, tokens: gs.Tensor, rows: gs.Tensor, longest: gs.Tensor | None = None) -> gs.Variable:
    """Whether it is one row, or one token of each, or rows that begin, where keys are as many as `longest` says."""
    fewest = added.node("Min", "fewest", [tokens, rows], np.int64, [1])
    alone = added.node("Equal", "alone", [fewest, added.constant("one", [1])], np.bool_, [1])
    if longest is None:
        return alone
    begins = added.node("Equal", "begins", [longest, tokens], np.bool_, [1])
    return added.node("Or", "in_place", [alone, begins], np.bool_, [1])


def bare_of(
    added: Added, whole: gs.Variable, can: gs.Variable, dtype: np.dtype[Any], bias: Callable[[Added], gs.Variable]
) -> tuple[gs.Variable, gs.Variable]:
    """`bare` and `bias` of a Step, whose rows are `whole` where nothing is hidden."""
    bare = added.node("And", "bare", [can, whole], np.bool_, [1])
    hides = Added(f"{added.name}/hides")
    made = bias(hides)
    branches = {
        "then_branch": unread(f"{added.name}/hides_nothing", dtype),
        "else_branch": gs.Graph(hides.nodes, [], [made], name=hides.name),
    }
    given = gs.Variable(f"{added.name}/bias", dtype.type, made.shape)
    added.nodes.append(gs.Node("If", given.name, branches, [bare], [given]))
    return bare, given


def unread(name: str, dtype: np.dtype[Any]) -> gs.Graph:
    """The branch of a mask or a bias where nobody reads it, which is empty."""
    added = Added(name)
    zero = gs.Constant(f"{name}/zero", np.zeros(1, dtype))
    sizes = added.constant("sizes", [0, 0, 0, 0])
    none = added.node("ConstantOfShape", "none", [sizes], dtype.type, [0, 0, 0, 0], value=zero)
    return gs.Graph(added.nodes, [], [none], name=name)


def group(
    graph: gs.Graph,
    node: gs.Node,
    form: Form,
    step: Callable[[list[gs.Node]], Step],
    said: dict[str, Any],
    beside: Sequence[gs.Tensor] = (),
) -> None:
    """Puts an If in the place of an attention and the nodes around it: one operator, or one for each row.

    step: gives what layers share, and adds the nodes that make it, if it is new. said: the operator's attributes but
    for the heads. beside: what it reads behind the bias.
    """
    at, before, writes = graph.nodes.index(node), list[gs.Node](), form.writes
    given = [as_rows(heads, before) for heads in form.heads]
    (q_heads, _), (kv_heads, _), _ = (heads.sizes for heads in form.heads)
    of_all, ends = step(before), [form.behind[-1].outputs[0], *(w.outputs[0] for w in writes)]
    # Of RoPE's angles and positions, as q and k are turned before.
    absent = [gs.Variable.empty() for _ in range(3)]
    inputs = [*given, *(w.inputs[0] for w in writes), of_all.last, of_all.total, *absent, of_all.bias, *beside]
    heads = {"num_heads": q_heads, "kv_num_heads": kv_heads}
    name = f"{node.name}/in_place"
    attend = gs.Node("GroupQueryAttention", name, heads | said, inputs, _anew(ends, name), "com.microsoft")
    for dead in (*form.behind, node, *writes):
        dead.inputs.clear()
        dead.outputs.clear()
    chosen = _chosen(f"{node.name}/slots", of_all.can, attend, _by_row(attend, ends, of_all.joined), ends)
    if of_all.bare is not None:
        name = f"{node.name}/bare"
        inputs = [gs.Variable.empty() if v is of_all.bias else v for v in inputs]
        bare = gs.Node(attend.op, name, attend.attrs, inputs, _anew(ends, name), attend.domain)
        chosen.name, chosen.outputs = f"{node.name}/hiding", _anew(ends, f"{node.name}/hiding")
        hiding = gs.Graph([chosen], [], [*chosen.outputs], name=chosen.name)
        chosen = _chosen(f"{node.name}/slots", of_all.bare, bare, hiding, ends)
    graph.nodes[at:at] = [*before, chosen]


def _anew(values: list[gs.Tensor], name: str) -> list[gs.Variable]:
    """What is in a branch in the place of these."""
    return [gs.Variable(f"{name}/{v.name}", v.dtype, v.shape) for v in values]


def _chosen(name: str, whether: gs.Variable, node: gs.Node, instead: gs.Graph, ends: list[gs.Tensor]) -> gs.Node:
    """An If that is `node`, or `instead` of it another graph."""
    then = gs.Graph([node], [], [*node.outputs], name=node.name)
    return gs.Node("If", name, {"then_branch": then, "else_branch": instead}, [whether], ends)


def _by_row(attend: gs.Node, ends: list[gs.Tensor], joined: tuple[gs.Variable, gs.Variable] | None) -> gs.Graph:
    """The branch in which each row is one for itself: `attend` in a Scan over the rows."""
    added, outside = Added(f"{attend.name}/by_row"), Added(f"{attend.name}/by_row")
    first, given, inputs = added.constant("first", [0]), list[tuple[gs.Variable, gs.Tensor]](), [*attend.inputs]
    if joined is not None:
        # Where ONNX Runtime knows how long a past is, it believes that a present is as long; not so a joined one.
        keys = outside.node("Cast", "keys", [joined[0]], np.int64, [1], to=onnx.TensorProto.INT64)
        slots = outside.node("Sub", "slots", [keys, joined[1]], np.int64, [1])
    for i, whole in enumerate(attend.inputs):
        if not whole.name or i in OF_ALL_ROWS:
            continue
        row = gs.Variable(f"{added.name}/{i}", whole.dtype, whole.shape[1:])
        given.append((row, whole))
        if joined is not None and i in PASTS:
            shape = [row.shape[0], f"{row.name}/slots", row.shape[2]]
            row = added.node("Slice", f"{i}/past", [row, first, slots, added.constant("second", [1])], row.dtype, shape)
        inputs[i] = added.node("Unsqueeze", f"{i}/alone", [row, first], row.dtype, [1, *row.shape])
    alone = [gs.Variable(f"{added.name}/{v.name}/alone", v.dtype, [1, *v.shape[1:]]) for v in ends]
    added.nodes.append(gs.Node(attend.op, f"{added.name}/attend", attend.attrs, inputs, alone, attend.domain))
    each = zip(ends, alone, strict=True)
    rows = [added.node("Squeeze", f"{v.name}/row", [a, first], v.dtype, v.shape[1:]) for v, a in each]
    body = gs.Graph(added.nodes, [row for row, _ in given], rows, name=f"{added.name}/body")
    made = _anew(ends, added.name)
    attributes = {"body": body, "num_scan_inputs": len(given)}
    scan = gs.Node("Scan", added.name, attributes, [whole for _, whole in given], made)
    return gs.Graph([*outside.nodes, scan], [], made, name=added.name)
