"""Gives Attention over the slots of a static cache to GroupQueryAttention, which writes them in place."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from llmexport.graphs.causal import is_causal
from llmexport.graphs.fusion import (
    HEADS_FIRST,
    Added,
    Fused,
    Refusal,
    float_type,
    fuse_each,
    is_read_before,
    produced_by,
)
from llmexport.graphs.rows import as_rows, flattened, rows_of

TYPES = ("float32", "float16")
Shared = dict[tuple[str, str], tuple[gs.Variable, ...]]  # by mask and past length, what all layers read


def lower_static_attention(graph: gs.Graph) -> Fused:
    """Rewrites every legal Attention over slots that TensorScatter writes, and names those that it leaves.

         q        k        v
         |        |        |                      q   cos, sin   k       v
     Transpose Transpose Transpose                 \\     |     /        |
         |        |        |                  [RotaryEmbedding] twice    |
      [Rope]   [Rope]      |                        |      |             |
         |        |        |                        |      |  pasts, mask, past length
         |  TensorScatter twice - pasts    =>       |      |      |      |
         |        |        |                        If one GroupQueryAttention can
        Attention ---------+- mask                  |      |      else TensorScatter twice, Attention
         |                                          y   presents
     Transpose
         |
      Reshape - y

    GroupQueryAttention reads the slots that are written, no others, and where past and present are one buffer it copies
    none; what the mask hides is a bias. It takes one row, or one token of each, or rows that begin: all else is left to
    the other branch. Legal if
    1. q, k and v are [B, T, H, D] with heads turned to the front, q and k by Rope after that or not at all,
    2. keys and values are the past's slots with these written from one length on, and nothing else reads them before,
    3. the mask [B, 1, T, S] shows no key that is written behind the query's, as the graph tells,
    4. keys and values have heads of one size, in a type that the operator has on a CPU,
    5. what is attended is read once, and turned back to [B, T, H * D].
    """
    return fuse_each(graph, ("Attention",), functools.partial(_lower, {}), where=_reads_slots)


def _reads_slots(node: gs.Node) -> bool:
    return produced_by(node.inputs[1], "TensorScatter") is not None


def _lower(shared: Shared, graph: gs.Graph, node: gs.Node) -> None:
    if len(node.inputs) != 4 or len(node.outputs) > 1:
        raise Refusal("it has not queries, keys, values and a mask alone")
    query, mask = node.inputs[0], node.inputs[3]
    keys, values = (_scattered(graph, node, node.inputs[i], what) for i, what in ((1, "keys"), (2, "values")))
    length = keys.inputs[2]
    if values.inputs[2] is not length:
        raise Refusal("its keys and values are written from different lengths on")
    apart = zip((query, keys.inputs[1], values.inputs[1]), ("q", "k", "v"), strict=True)
    rows = [rows_of(value, what) for value, what in apart]
    if rows[2][1]:
        raise Refusal("its values are turned by Rope")
    sizes = [source.shape[2:] for source, _ in rows]
    if len({size for _, size in sizes}) > 1:
        raise Refusal("its values have heads of another size than its keys")
    if float_type(query) not in TYPES:
        raise Refusal(f"it is of {float_type(query) or 'no float type'}, not of {' or '.join(TYPES)}")
    slots = keys.inputs[0].shape[2]
    if not is_causal(mask, length, slots):
        raise Refusal("its mask may show keys that are written behind the query's")
    turned, flat = flattened(graph, node)
    at, before = graph.nodes.index(node), list[gs.Node]()
    given = [as_rows(source, rope, before) for source, rope in rows]
    if (mask.name, length.name) not in shared:
        shared[mask.name, length.name] = _written(mask, length, query, before)
    bias, last, total, can = shared[mask.name, length.name]
    ends = [flat.outputs[0], keys.outputs[0], values.outputs[0]]
    pasts = [keys.inputs[0], values.inputs[0]]
    branches = {
        "then_branch": _in_place(node, [*given, *pasts, last, total], bias, sizes, ends),
        "else_branch": _copied(node, given, pasts, mask, length, sizes, ends),
    }
    for dead in (turned, flat, node, keys, values):
        dead.inputs.clear()
        dead.outputs.clear()
    graph.nodes[at:at] = [*before, gs.Node("If", f"{node.name}/slots", branches, [can], ends)]


def _scattered(graph: gs.Graph, attention: gs.Node, value: gs.Tensor, what: str) -> gs.Node:
    """The TensorScatter that writes what is new into the slots of the past."""
    node = produced_by(value, "TensorScatter")
    if node is None or node.attrs.get("mode", "linear") != "linear" or node.attrs.get("axis", -2) not in (-2, 2):
        raise Refusal(f"its {what} are not slots that this step is written into")
    if is_read_before(graph, attention, value):
        raise Refusal(f"its {what} are read before")
    return node


def _written(mask: gs.Tensor, length: gs.Tensor, query: gs.Tensor, before: list[gs.Node]) -> tuple[gs.Variable, ...]:
    """For all layers: the mask as a bias over the slots that are written, each row's last slot, how many slots that is,
    and whether GroupQueryAttention takes the step."""
    added, batch, dtype = Added(f"{mask.name}/written"), mask.shape[0], np.dtype(query.dtype)
    add, one = added.node, added.constant("one", [1])
    tokens = add("Shape", "tokens", [mask], np.int64, [1], start=2, end=3)
    rows = add("Shape", "rows", [length], np.int64, [1])
    ends = add("Add", "ends", [length, tokens], np.int64, [batch])
    longest = add("ReduceMax", "longest", [ends], np.int64, [1], keepdims=1)
    total = add("Cast", "total", [longest], np.int32, [1], to=onnx.TensorProto.INT32)
    wide = add("Sub", "last/wide", [ends, one], np.int64, [batch])
    last = add("Cast", "last", [wide], np.int32, [batch], to=onnx.TensorProto.INT32)
    places = [added.constant("first", [0]), longest, added.constant("axis", [3])]
    shape = [batch, 1, mask.shape[2], f"{added.name}/slots"]
    seen = add("Slice", "seen", [mask, *places], np.bool_, shape)
    sides = [added.constant(said, value, dtype) for said, value in (("shown", 0.0), ("hidden", -np.inf))]
    bias = add("Where", "bias", [seen, *sides], dtype.type, shape)
    kinds = {"one_token": (tokens, one), "begins": (longest, tokens), "one_row": (rows, one)}
    found = [add("Equal", said, [*pair], np.bool_, [1]) for said, pair in kinds.items()]
    some = add("Or", "some", found[:2], np.bool_, [1])
    can = add("Or", "in_place", [some, found[2]], np.bool_, [1])
    before.extend(added.nodes)
    return bias, last, total, can


def _in_place(
    node: gs.Node, given: list[gs.Tensor], bias: gs.Tensor, sizes: list[list[int]], ends: list[gs.Tensor]
) -> gs.Graph:
    """The branch of one operator."""
    name, made = f"{node.name}/in_place", _like(ends, f"{node.name}/in_place")
    heads = {"num_heads": sizes[0][0], "kv_num_heads": sizes[1][0]}
    said = {n: v for n, v in node.attrs.items() if n in ("scale", "softcap")}
    # Of RoPE's angles and positions, as q and k are turned before.
    absent = [gs.Variable.empty() for _ in range(3)]
    attend = gs.Node("GroupQueryAttention", name, heads | said, [*given, *absent, bias], made, "com.microsoft")
    return gs.Graph([attend], [], made, name=name)


def _copied(
    node: gs.Node,
    given: list[gs.Tensor],
    pasts: list[gs.Tensor],
    mask: gs.Tensor,
    length: gs.Tensor,
    sizes: list[list[int]],
    ends: list[gs.Tensor],
) -> gs.Graph:
    """The branch that computes as the graph did before."""
    name, nodes = f"{node.name}/copied", list[gs.Node]()
    made = _like(ends, name)

    def add(op: str, inputs: list[gs.Tensor], value: gs.Variable, **attrs: object) -> gs.Variable:
        nodes.append(gs.Node(op, value.name, attrs, inputs, [value]))
        return value

    def heads(i: int) -> gs.Variable:
        batch, tokens = given[i].shape[:2]
        shape = gs.Constant(f"{name}/{i}/shape", np.array([0, 0, *sizes[i]], np.int64))
        apart = gs.Variable(f"{name}/{i}/apart", given[i].dtype, [batch, tokens, *sizes[i]])
        first = gs.Variable(f"{name}/{i}/first", given[i].dtype, [batch, sizes[i][0], tokens, sizes[i][1]])
        return add("Transpose", [add("Reshape", [given[i], shape], apart)], first, perm=HEADS_FIRST)

    query = heads(0)
    for i in (1, 2):
        add("TensorScatter", [pasts[i - 1], heads(i), length], made[i], axis=-2, mode="linear")
    mixed = gs.Variable(f"{name}/mixed", query.dtype, query.shape)
    add("Attention", [query, *made[1:], mask], mixed, **node.attrs)
    back = gs.Variable(f"{name}/back", query.dtype, [query.shape[i] for i in HEADS_FIRST])
    add("Transpose", [mixed], back, perm=HEADS_FIRST)
    flat = gs.Constant(f"{name}/flat", np.array([0, 0, sizes[0][0] * sizes[0][1]], np.int64))
    add("Reshape", [back, flat], made[0])
    return gs.Graph(nodes, [], made, name=name)


def _like(values: list[gs.Tensor], name: str) -> list[gs.Tensor]:
    """What a branch gives, in the place of these values."""
    return [gs.Variable(f"{name}/{v.name}", v.dtype, v.shape) for v in values]
