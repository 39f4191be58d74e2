"""Gives multi-head latent attention the slots that are written, and in each step the cheaper of its two forms."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from llmexport.graphs.fusion import Added, Fused, fuse_each, produced_by
from llmexport.graphs.grouped import unread
from llmexport.graphs.latents import ALONE, Form, form_of


@dataclass(frozen=True)
class Step:
    """What all layers read: whether a step makes keys and values of each head, the mask of the keys that there are, the
    same for each head below the other, [B, 1, H * T, N], empty where it makes them, and how many slots are written."""

    expands: gs.Variable
    mask: gs.Tensor
    below: gs.Variable
    written: gs.Variable | None


Steps = dict[tuple[str | int, ...], Step]  # by mask, length and sizes


def lower_latent_attention(graph: gs.Graph) -> Fused:
    """Rewrites every legal Attention over latents, and names those that it leaves.

         own                                          own, turned, matrices     latent, shared
          |                                               |                        |
        MatMul - key matrices                             |                     [Slice] twice - written
          |                                               |                        |
        Concat - turned    latent   shared                If a step makes keys and values of each head
          |                   |       |                   |   FusedMatMul twice
          |                   Concat--+          =>       |   Attention - mask
          |                     |                         | else
          Attention ------------+- mask                   |   MatMul
              |                                           |   Attention of all heads' queries as one head's - mask
            Slice                                         |   FusedMatMul
              |                                           |
          Transpose                                   Transpose
              |                                           |
            MatMul - value matrices                       y
              |
          Transpose - y

    Of N keys, T tokens, and sizes K of a key, V of a value, L of a latent and R of a shared key, a head takes
    N L (K + V) products to make keys and values and T N (K + R + V) to attend, or else T L (K + V) to multiply with the
    matrices and T N 2 (L + R) to attend. A step takes what is less: the first of a prompt, the second of a token behind
    others, where the queries of all heads lie below each other, as they share a key: one product reads it. Legal if
    1. keys and values are one, latents with the keys beside them that heads share,
    2. queries are own parts times matrices, with turned parts beside them,
    3. of what is attended the latents alone are kept, times matrices, turned to [B, T, H, V], and each is read once,
    4. the matrices are [H, D, L], and nodes make them, as a weight itself gets another name when it is bound,
    5. the mask is [B, 1, T, N], and nothing else hides keys,
    6. slots, if keys lie in such, are written from one length on, and the mask shows no key that is written behind the
       query's, as the graph tells, which a block alone does not, as it is given its mask,
    7. it is of a type that the operators have on a CPU.
    """
    return fuse_each(graph, ("Attention",), functools.partial(_lower, {}), where=_reads_latents)


def _reads_latents(node: gs.Node) -> bool:
    return node.inputs[1] is node.inputs[2] and produced_by(node.inputs[1], "Concat") is not None


def _lower(steps: Steps, graph: gs.Graph, node: gs.Node) -> None:
    form, added = form_of(graph, node), Added(f"{node.name}/latent")
    *dead, last = form.behind
    # Where all that the branches read is made.
    at, before = graph.nodes.index(dead[-1]), list[gs.Node]()
    known = form.mask.name, form.length.name if form.length else "", *form.sizes
    if known not in steps:
        steps[known] = _step(Added(f"{form.mask.name}/latent.{len(steps)}"), form, before)
    step = steps[known]
    seen = [_written(added, said, v, step) for said, v in (("latents", form.latent), ("shared", form.shared))]
    said = {n: v for n, v in node.attrs.items() if n not in ALONE}
    attended = _chosen(
        added,
        "attended",
        step.expands,
        _expanded(form, step, seen, said, Added(f"{added.name}/of_each")),
        _absorbed(form, step, seen, said, Added(f"{added.name}/of_all")),
    )
    for gone in (node, *dead):
        gone.inputs.clear()
        gone.outputs.clear()
    last.inputs[0] = attended
    last.attrs["perm"] = [0, 2, 1, 3]
    graph.nodes[at:at] = [*before, *added.nodes]


def _step(added: Added, form: Form, before: list[gs.Node]) -> Step:
    """For all layers of these sizes under a mask."""
    add, mask, written, (heads, key, value, latent, shared) = added.node, form.mask, None, form.sizes
    tokens = add("Shape", "tokens", [mask], np.int64, [1], start=2, end=3)
    if form.length is None:
        count = add("Shape", "keys", [mask], np.int64, [1], start=3, end=4)
    else:
        ends = add("Add", "ends", [form.length, tokens], np.int64, form.length.shape)
        count = written = add("ReduceMax", "written", [ends], np.int64, [1], keepdims=1)
        places = [added.constant("first", [0]), written, added.constant("axis", [3])]
        mask = add("Slice", "mask", [mask, *places], mask.dtype, [*mask.shape[:3], written.name])
    past = add("Sub", "past", [count, tokens], np.int64, [1])
    more = add("Mul", "more", [past, added.constant("more/each", [latent * (key + value)])], np.int64, [1])
    pairs = add("Mul", "pairs", [count, tokens], np.int64, [1])
    each = 2 * (latent + shared) - (key + shared + value)
    fewer = add("Mul", "fewer", [pairs, added.constant("fewer/each", [each])], np.int64, [1])
    expands = add("Less", "expands", [more, fewer], np.bool_, [1])
    repeats, shape = Added(f"{added.name}/repeats"), [mask.shape[0], 1, f"{added.name}/rows", mask.shape[3]]
    each_head, rows = repeats.constant("heads", [1, heads, 1, 1]), repeats.constant("rows", [0, 1, -1, 0])
    every = repeats.node("Expand", "every", [mask, each_head], mask.dtype, [mask.shape[0], heads, *mask.shape[2:]])
    repeats.node("Reshape", "below", [every, rows], mask.dtype, shape)
    absent = unread(f"{added.name}/absent", np.dtype(mask.dtype))
    below = _chosen(added, "below", expands, absent, _branch(repeats))
    before.extend(added.nodes)
    return Step(expands, mask, below, written)


def _written(added: Added, said: str, value: gs.Tensor, step: Step) -> gs.Tensor:
    """What there is of it: of slots, those that are written."""
    if step.written is None:
        return value
    places = [added.constant("first", [0]), step.written, added.constant("axis", [2])]
    shape = [*value.shape[:2], step.written.name, value.shape[3]]
    return added.node("Slice", said, [value, *places], value.dtype, shape)


def _expanded(form: Form, step: Step, seen: Sequence[gs.Tensor], said: dict[str, Any], added: Added) -> gs.Graph:
    """The branch that makes keys and values of each head."""
    add, dtype, (heads, key, value, _, shared) = added.node, form.own.dtype, form.sizes
    own, (latent, turned), keys = form.own.shape, seen, [form.own.shape[0], heads, seen[0].shape[2]]
    query = add("Concat", "query", [form.own, form.turned], dtype, [*own[:3], key + shared], axis=-1)
    made = _product(added, "own_key", latent, form.key_matrices, [*keys, key])
    each_head = added.constant("heads", [1, heads, 1, 1])
    every = add("Expand", "shared_key", [turned, each_head], dtype, [*keys, shared])
    whole = add("Concat", "key", [made, every], dtype, [*keys, key + shared], axis=-1)
    values = _product(added, "value", latent, form.value_matrices, [*keys, value])
    add("Attention", "attention", [query, whole, values, step.mask], dtype, [*own[:3], value], **said)
    return _branch(added)


def _absorbed(form: Form, step: Step, seen: Sequence[gs.Tensor], said: dict[str, Any], added: Added) -> gs.Graph:
    """The branch that multiplies queries with the matrices, and what is attended."""
    add, dtype, (heads, _, value, size, shared) = added.node, form.own.dtype, form.sizes
    own, (latent, turned), rows = form.own.shape, seen, [form.own.shape[0], 1, step.below.shape[2]]
    product = add("MatMul", "absorbed", [form.own, form.key_matrices], dtype, [*own[:3], size])
    query = add("Concat", "query", [product, form.turned], dtype, [*own[:3], size + shared], axis=-1)
    below = added.constant("rows", [0, 1, -1, size + shared])
    query = add("Reshape", "queries", [query, below], dtype, [*rows, size + shared])
    whole = add("Concat", "key", [latent, turned], dtype, [*latent.shape[:3], size + shared], axis=-1)
    mixed = add("Attention", "attention", [query, whole, latent, step.below], dtype, [*rows, size], **said)
    apart = add("Reshape", "mixed", [mixed, added.constant("heads", [0, heads, -1, size])], dtype, [*own[:3], size])
    _product(added, "attended", apart, form.value_matrices, [*own[:3], value])
    return _branch(added)


def _product(added: Added, said: str, rows: gs.Tensor, matrices: gs.Tensor, shape: Sequence[int | str]) -> gs.Variable:
    """Rows times the transposes of matrices."""
    made = added.node("FusedMatMul", said, [rows, matrices], rows.dtype, shape, transB=1)
    added.nodes[-1].domain = "com.microsoft"
    return made


def _branch(added: Added) -> gs.Graph:
    """What gives what its last node does."""
    return gs.Graph(added.nodes, [], [*added.nodes[-1].outputs], name=added.name)


def _chosen(added: Added, said: str, whether: gs.Variable, then: gs.Graph, otherwise: gs.Graph) -> gs.Variable:
    """What one branch or the other gives."""
    [like] = otherwise.outputs
    return added.node("If", said, [whether], like.dtype, like.shape, then_branch=then, else_branch=otherwise)
