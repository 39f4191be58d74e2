"""Gives Attention over the slots of a static cache to GroupQueryAttention, which writes them in place."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from llmexport.graphs.causal import hides_rows_alone, is_causal, window_of
from llmexport.graphs.fusion import Added, Fused, Refusal, float_type, fuse_each, is_read_before, produced_by
from llmexport.graphs.grouped import Step, bare_of, bias_of, form_of, group, takes

Shared = dict[tuple[str, str], Step]  # by mask and past length


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
        Attention ---------+- mask                  |      |      else one for each row
         |                                          y   presents
     Transpose
         |
      Reshape - y

    GroupQueryAttention reads the slots that are written, no others, and where past and present are one buffer it copies
    none. What the mask hides is a bias, which a step does without where no row is padded and no window hides anything.
    It takes one row, or one token of each, or rows that begin: in the other branch it takes row by row. Legal if
    1. heads of q, k and v are of a known number and size; Rope alone stands between what turns them to the front and
       Attention or the slots, of q and k, or they are turned back,
    2. keys and values are the past's slots with these written from one length on, and nothing else reads them before,
    3. the mask [B, 1, T, S], or that by which a Where makes a bias [B, H, T, S] of the queries' type, shows no key that
       is written behind the query's, as the graph tells,
    4. keys and values have heads of one size, a multiple of 8, in a type that the operator has on a CPU,
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
    form = form_of(graph, node, (keys, values))
    slots = keys.inputs[0].shape[2]
    if (kind := float_type(mask)) not in ("", float_type(node.inputs[0])):
        raise Refusal(f"its bias is of {kind}, its queries are not")
    if not is_causal(mask, length, slots):
        raise Refusal("its mask may show keys that are written behind the query's")

    def step(before: list[gs.Node]) -> Step:
        known = mask.name, length.name
        if known not in shared:
            shared[known] = _written(mask, length, slots, query, before)
        return shared[known]

    said = {n: v for n, v in node.attrs.items() if n in ("scale", "softcap")}
    if (window := window_of(mask, length, slots)) is not None:
        said["local_window_size"] = window
    group(graph, node, form, step, said)


def _scattered(graph: gs.Graph, attention: gs.Node, value: gs.Tensor, what: str) -> gs.Node:
    """The TensorScatter that writes what is new into the slots of the past."""
    node = produced_by(value, "TensorScatter")
    if node is None or node.attrs.get("mode", "linear") != "linear" or node.attrs.get("axis", -2) not in (-2, 2):
        raise Refusal(f"its {what} are not slots that this step is written into")
    if is_read_before(graph, attention, value):
        raise Refusal(f"its {what} are read before")
    return node


def _written(mask: gs.Tensor, length: gs.Tensor, slots: int, query: gs.Tensor, before: list[gs.Node]) -> Step:
    """For all layers, with the mask as a bias over the slots that are written."""
    added, batch, dtype = Added(f"{mask.name}/written"), mask.shape[0], np.dtype(query.dtype)
    add = added.node
    tokens = add("Shape", "tokens", [mask], np.int64, [1], start=2, end=3)
    rows = add("Shape", "rows", [length], np.int64, [1])
    ends = add("Add", "ends", [length, tokens], np.int64, [batch])
    longest = add("ReduceMax", "longest", [ends], np.int64, [1], keepdims=1)
    total = add("Cast", "total", [longest], np.int32, [1], to=onnx.TensorProto.INT32)
    wide = add("Sub", "last/wide", [ends, added.constant("one", [1])], np.int64, [batch])
    last = add("Cast", "last", [wide], np.int32, [batch], to=onnx.TensorProto.INT32)
    can = takes(added, tokens, rows, longest)

    def hides(within: Added) -> gs.Variable:
        places = [within.constant("first", [0]), longest, within.constant("axis", [3])]
        seen = within.node("Slice", "seen", [mask, *places], mask.dtype, [*mask.shape[:3], f"{added.name}/slots"])
        return bias_of(within, seen, dtype) if seen.dtype == np.bool_ else seen

    if hides_rows_alone(mask, length, slots):
        # Of the last query, as slot 0 may be the first one's own.
        corner = {"last/query": [-1, 0], "behind": [np.iinfo(np.int64).max, 1], "axes": [2, 3]}
        places = [added.constant(said, value) for said, value in corner.items()]
        shown = add("Slice", "shown", [mask, *places], np.bool_, [batch, 1, 1, 1])
        number = add("Cast", "shown/number", [shown], np.int32, [batch, 1, 1, 1], to=onnx.TensorProto.INT32)
        least = add("ReduceMin", "shown/by_all", [number], np.int32, [], keepdims=0)
        whole = add("Cast", "whole", [least], np.bool_, [], to=onnx.TensorProto.BOOL)
        bare, bias = bare_of(added, whole, can, dtype, hides)
    else:
        bare, bias = None, hides(added)
    before.extend(added.nodes)
    return Step(last, total, can, bias, bare)
