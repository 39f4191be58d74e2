"""Gives Attention over the slots of a static cache to GroupQueryAttention, which writes them in place."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from llmexport.graphs.causal import is_causal
from llmexport.graphs.fusion import Added, Fused, Refusal, fuse_each, is_read_before, produced_by
from llmexport.graphs.grouped import Step, bias_of, form_of, group, takes

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
    none; what the mask hides is a bias. It takes one row, or one token of each, or rows that begin: in the other branch
    it takes row by row. Legal if
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
    form = form_of(graph, node, (keys, values))
    if not is_causal(mask, length, keys.inputs[0].shape[2]):
        raise Refusal("its mask may show keys that are written behind the query's")

    def step(before: list[gs.Node]) -> Step:
        known = mask.name, length.name
        if known not in shared:
            shared[known] = _written(mask, length, query, before)
        return shared[known]

    group(graph, node, form, step, {n: v for n, v in node.attrs.items() if n in ("scale", "softcap")})


def _scattered(graph: gs.Graph, attention: gs.Node, value: gs.Tensor, what: str) -> gs.Node:
    """The TensorScatter that writes what is new into the slots of the past."""
    node = produced_by(value, "TensorScatter")
    if node is None or node.attrs.get("mode", "linear") != "linear" or node.attrs.get("axis", -2) not in (-2, 2):
        raise Refusal(f"its {what} are not slots that this step is written into")
    if is_read_before(graph, attention, value):
        raise Refusal(f"its {what} are read before")
    return node


def _written(mask: gs.Tensor, length: gs.Tensor, query: gs.Tensor, before: list[gs.Node]) -> Step:
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
    places = [added.constant("first", [0]), longest, added.constant("axis", [3])]
    seen = add("Slice", "seen", [mask, *places], np.bool_, [batch, 1, mask.shape[2], f"{added.name}/slots"])
    bias, can = bias_of(added, seen, dtype), takes(added, tokens, rows, longest)
    before.extend(added.nodes)
    return Step(bias, last, total, can)
