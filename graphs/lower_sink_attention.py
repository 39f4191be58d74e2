"""Gives SinkAttention over the slots of a static cache to GroupQueryAttention, which reads those that are written."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from llmexport.graphs.fusion import Added, Fused, Refusal, fuse_each, is_read_before, producer
from llmexport.graphs.grouped import Step, bare_of, bias_of, form_of, group, takes
from llmexport.graphs.sums import ONE, Sum, plus, sum_of

WRITES = {"Concat": 2, "TensorScatter": 3}  # and how much each reads
SAID = {"softcap": "softcap", "window": "local_window_size"}  # what is 0 where there is none
NOTHING = -6e4  # a logit beside which any other is all
Shared = dict[tuple[str, ...], Step]  # by the spans and the lengths that slots are written from


def lower_sink_attention(graph: gs.Graph) -> Fused:
    """Rewrites every legal SinkAttention over slots, and names those that it leaves.

         q        k        v
         |        |        |                      q   cos, sin   k       v
     Transpose Transpose Transpose                 \\     |     /        |
         |        |        |                  [RotaryEmbedding] twice    |
      [Rope]   [Rope]      |                        |      |             |
         |        |        |                        |      |  pasts, span, [sinks]
         |   TensorScatter or Concat                |      |      |      |
         |     twice, with pasts    =>              If one GroupQueryAttention can
         |        |        |                        |      else one for each row
        SinkAttention -----+- span, [sinks]         |      |
         |                                          |      |
      Reshape - y                                   y   presents

    A window's layers keep their last slots, to which a step's keys are joined. What is before a row's first key, if
    anything is, a bias hides. GroupQueryAttention takes one row, or one token of each, or rows that begin: in the other
    branch it takes row by row. A cache that grows is no candidate, as nothing is gained there. Legal if
    1. heads of q, k and v are of a known number and size; Rope alone stands between what turns them to the front and
       this op or the slots, of q and k, or they are turned back, but one of them,
    2. keys and values are the past's slots with these written from one length on or joined, and nothing else reads them
       before,
    3. keys end where the step was written, as the graph tells, which a block alone does not, as it is given their end,
    4. keys and values have heads of one size, a multiple of 8, in a type that the operator has on a CPU,
    5. what is attended is read once, to make [B, T, H * D] of it.
    """
    return fuse_each(graph, ("SinkAttention",), functools.partial(_lower, {}), where=_reads_slots)


def _reads_slots(node: gs.Node) -> bool:
    made = producer(node.inputs[1])
    return made is not None and isinstance((made.inputs[0].shape or [None] * 3)[2], int)


def _lower(shared: Shared, graph: gs.Graph, node: gs.Node) -> None:
    start, length = node.inputs[3:5]
    keys, values = (_written(graph, node, node.inputs[i], what) for i, what in ((1, "keys"), (2, "values")))
    if keys.op != values.op or keys.inputs[2:] != values.inputs[2:]:
        raise Refusal("its keys and values are not written alike")
    form = form_of(graph, node, (keys, values))
    query = form.heads[0]
    # [B, T, ...]: what all layers read, if there is such, as a layer may be cut out.
    tokens = query.rope.inputs[1] if query.rope else next((h.source for h in form.heads if not h.first), None)
    if tokens is None:
        raise Refusal("neither q, k nor v is [B, T, H, D] with its heads turned to the front")
    past: Sum = sum_of(keys.inputs[2]) if keys.inputs[2:] else {ONE: keys.inputs[0].shape[2]}
    if sum_of(length) != plus(past, tokens.shape[1]):
        raise Refusal("its keys may end elsewhere than the step that is written")

    def step(before: list[gs.Node]) -> Step:
        known = tokens.name, start.name, length.name, *(v.name for v in keys.inputs[2:]), str(keys.inputs[0].shape[2])
        if known not in shared:
            shared[known] = _seen(start, length, tokens, np.dtype(query.source.dtype), keys, before)
        return shared[known]

    said = {"scale": node.attrs["scale"]}
    said |= {new: node.attrs[old] for old, new in SAID.items() if node.attrs[old]}
    sinks = _sinks(graph, node, np.dtype(query.source.dtype), query.sizes[0])
    group(graph, node, form, step, said, [sinks])


def _sinks(graph: gs.Graph, node: gs.Node, dtype: np.dtype[Any], heads: int) -> gs.Tensor:
    """The sinks in the type of queries, in whatever type they will be stored. Where there are none, sinks that take
    nothing from a key, and all from a query without keys, which else has no softmax."""
    if not node.inputs[5:]:
        return gs.Constant(f"{node.name}/sinks", np.full(heads, NOTHING, dtype))
    sinks = node.inputs[5]
    cast = gs.Variable(f"{node.name}/sinks", dtype.type, sinks.shape)
    to = onnx.helper.np_dtype_to_tensor_dtype(dtype)
    graph.nodes.insert(graph.nodes.index(node), gs.Node("Cast", cast.name, {"to": to}, [sinks], [cast]))
    node.inputs[5] = cast
    return cast


def _written(graph: gs.Graph, attention: gs.Node, value: gs.Tensor, what: str) -> gs.Node:
    """The node that writes what is new into the slots of the past, or joins it to them."""
    node = producer(value)
    kind = "" if node is None or node.domain else node.op
    if node is None or WRITES.get(kind) != len(node.inputs) or node.attrs.get("axis", -2) not in (2, -2):
        raise Refusal(f"its {what} are not slots that this step is written into or joined to")
    if node.attrs.get("mode", "linear") != "linear":
        raise Refusal(f"its {what} are written in a circle")
    if producer(node.inputs[0]) or isinstance(node.inputs[0], gs.Constant):
        raise Refusal(f"the {what} of the past are no input")
    if is_read_before(graph, attention, value):
        raise Refusal(f"its {what} are read before")
    return node


def _seen(
    start: gs.Tensor, length: gs.Tensor, row: gs.Tensor, dtype: np.dtype[Any], keys: gs.Node, before: list[gs.Node]
) -> Step:
    """For all layers, with what is before a row's first key as a bias; row: of as many tokens as the step."""
    added = Added(f"{length.name}/{keys.op.lower()}")
    add, batch = added.node, row.shape[0]
    tokens = add("Shape", "tokens", [row], np.int64, [1], start=1, end=2)
    rows = add("Shape", "rows", [start], np.int64, [1])
    joins = not keys.inputs[2:]
    past = added.constant("past", [keys.inputs[0].shape[2]]) if joins else keys.inputs[2]
    longest = add("Add", "written", [past, tokens], np.int64, past.shape)
    if not joins:
        longest = add("ReduceMax", "longest", [longest], np.int64, [1], keepdims=1)
    total = add("Cast", "total", [longest], np.int32, [1], to=onnx.TensorProto.INT32)
    last = add("Sub", "last", [length, added.constant("token", [1], np.int32)], np.int32, [batch])
    can = takes(added, tokens, rows, None if joins else longest)

    def hides(within: Added) -> gs.Variable:
        add, slots = within.node, f"{added.name}/slots"
        none, step = within.constant("none", 0, np.int32), within.constant("step", 1, np.int32)
        many = add("Squeeze", "many", [total], np.int32, [])
        numbers = add("Range", "slots", [none, many, step], np.int32, [slots])
        first = add("Unsqueeze", "first", [start, within.constant("axes", [1, 2, 3])], start.dtype, [batch, 1, 1, 1])
        seen = add("GreaterOrEqual", "seen", [numbers, first], np.bool_, [batch, 1, 1, slots])
        return bias_of(within, seen, dtype, tokens)

    latest = add("ReduceMax", "latest", [start], start.dtype, [1], keepdims=1)
    whole = add("Equal", "whole", [latest, added.constant("none", [0], np.int32)], np.bool_, [1])
    bare, bias = bare_of(added, whole, can, dtype, hides)
    before.extend(added.nodes)
    return Step(last, total, can, bias, bare, (total, tokens) if joins else None)
