"""The result of a fusion pass, and the functions by which every pass reads a graphsurgeon graph and edits it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import ArrayLike, DTypeLike

from llmexport.plugins.dtypes import BY_NAME, FLOATS
from llmexport.plugins.spec import DOMAIN

HEADS_FIRST = [0, 2, 1, 3]


class Refusal(Exception):
    """The reason why one candidate is left as it is."""


@dataclass
class Fused:
    """How many fused nodes a pass made, and the candidates that it left, each with its reason."""

    count: int = 0
    refused: list[tuple[str, str]] = field(default_factory=list)


def fuse_each(
    graph: gs.Graph,
    ops: tuple[str, ...],
    fuse: Callable[[gs.Graph, gs.Node], None],
    where: Callable[[gs.Node], bool] = lambda node: True,
) -> Fused:
    """Calls `fuse` on every standard operator or op of ours of these types that `where` is true of: `fuse` edits the
    graph, or raises Refusal instead. One that a later op has taken in is not among those left."""
    fused, left = Fused(), []
    for node in [n for n in graph.nodes if n.op in ops and n.domain in (None, "", DOMAIN) and where(n)]:
        try:
            fuse(graph, node)
            fused.count += 1
        except Refusal as refusal:
            left.append((node, str(refusal)))
    _sweep(graph)
    there = {id(n) for n in graph.nodes}
    fused.refused = [(n.name, why) for n, why in left if id(n) in there]
    return fused


def producer(value: gs.Tensor) -> gs.Node | None:
    """The node that makes `value`; None for inputs and constants."""
    return value.inputs[0] if value.inputs else None


def produced_by(value: gs.Tensor, op: str, domain: str = "") -> gs.Node | None:
    """The node that makes `value`, if it is of type `op`: a standard operator, or one of `domain`."""
    node = producer(value)
    return node if node is not None and node.op == op and (node.domain or "") == domain else None


def turns_heads(node: gs.Node) -> bool:
    """Whether it is a Transpose between [B, T, heads, D] and [B, heads, T, D]."""
    return node.op == "Transpose" and list(node.attrs.get("perm", ())) == HEADS_FIRST


def heads_behind_tokens(value: gs.Tensor) -> gs.Tensor | None:
    """The [B, T, heads, D] that was turned to this [B, heads, T, D]; None if none was."""
    turned = produced_by(value, "Transpose")
    return turned.inputs[0] if turned is not None and turns_heads(turned) else None


def is_read_before(graph: gs.Graph, node: gs.Node, value: gs.Tensor) -> bool:
    """Whether another node than `node`, which reads `value`, reads it before."""
    place = graph.nodes.index(node)
    return any(graph.nodes.index(reader) < place for reader in value.outputs if reader is not node)


def sole_consumer(value: gs.Tensor, what: str) -> gs.Node:
    """The one node that reads `value`. Raises Refusal if several nodes do, or none does, as with a graph output."""
    if len(value.outputs) != 1:
        raise Refusal(f"{what} has {len(value.outputs)} consumers")
    return value.outputs[0]


def other_input(node: gs.Node, value: gs.Tensor) -> gs.Tensor:
    """The other operand of a binary node."""
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def scalar(value: gs.Tensor) -> float | None:
    """The number that a constant of one element holds."""
    if isinstance(value, gs.Constant) and int(np.prod(value.shape)) == 1:
        return float(np.asarray(value.values).reshape(()))
    return None


def holds(value: gs.Tensor, number: float) -> bool:
    """Whether it is this number throughout, as the graph tells."""
    if isinstance(value, gs.Constant):
        return bool((np.asarray(value.values) == number).all())
    node = produced_by(value, "ConstantOfShape")
    return (
        node is not None
        and float(np.asarray(node.attrs["value"].values).item() if "value" in node.attrs else 0) == number
    )


def same_shape(*values: gs.Tensor) -> bool:
    """Whether all are known to have one shape, symbolic dimensions compared by name."""
    shapes = [None if v.shape is None else list(v.shape) for v in values]
    return None not in shapes and all(s == shapes[0] for s in shapes)


def float_type(value: gs.Tensor) -> str:
    """float32, float16 or bfloat16, which graphsurgeon calls by its ONNX number; "" for any other type."""
    numbered = {BY_NAME[n].onnx: n for n in FLOATS}
    name = numbered.get(value.dtype, "") if isinstance(value.dtype, int) else str(np.dtype(value.dtype or object))
    return name if name in FLOATS else ""


def check_operands(*values: gs.Tensor) -> None:
    """Raises Refusal unless all are of one float type that our ops take, and of the rank they take, 3."""
    kinds = [float_type(v) for v in values]
    if not kinds[0] or kinds.count(kinds[0]) != len(kinds):
        raise Refusal("its operands are not of one float type")
    if any(len(v.shape or ()) != 3 for v in values):
        raise Refusal("its operands are not of rank 3")


def is_output(graph: gs.Graph, value: gs.Tensor) -> bool:
    return any(value is o for o in graph.outputs)


def replace(
    at: gs.Node,
    dead: Sequence[gs.Node],
    op: str,
    inputs: list[gs.Tensor],
    outputs: list[gs.Tensor],
    attributes: dict[str, Any],
) -> None:
    """Makes the node `at` one llmexport op; `dead` nodes lose their outputs and are swept up.

    `at` must stand where all `inputs` are made and none of `outputs` is used before.
    """
    for node in (*dead, at):
        node.inputs.clear()
        node.outputs.clear()
    at.name, at.op, at.domain, at.attrs = f"{at.name}/{op}", op, DOMAIN, attributes
    at.inputs.extend(inputs)
    at.outputs.extend(outputs)


def insert(
    graph: gs.Graph,
    op: str,
    name: str,
    attributes: dict[str, Any],
    inputs: list[gs.Tensor],
    outputs: list[gs.Tensor],
    early: str,
) -> None:
    """Adds one of our ops behind all that makes its inputs; those that made its outputs lose them and are swept up.

    Raises Refusal with the reason `early` if an output is read before.
    """
    places = {id(node): i for i, node in enumerate(graph.nodes)}
    made = max((places[id(n)] for x in inputs if (n := producer(x))), default=-1)
    if any(places[id(reader)] <= made for y in outputs for reader in y.outputs):
        raise Refusal(early)
    for y in outputs:
        y.inputs.clear()
    graph.nodes.insert(made + 1, gs.Node(op, name, attributes, inputs, outputs, domain=DOMAIN))


class Added:
    """Nodes to stand before one; values and nodes are called `name` and what is said of each."""

    def __init__(self, name: str) -> None:
        self.name, self.nodes = name, list[gs.Node]()

    def node(
        self, op: str, said: str, inputs: list[gs.Tensor], dtype: DTypeLike, shape: Sequence[int | str], **attrs: Any
    ) -> gs.Variable:
        value = gs.Variable(f"{self.name}/{said}", dtype, shape)
        self.nodes.append(gs.Node(op, value.name, attrs, inputs, [value]))
        return value

    def constant(self, said: str, value: ArrayLike, dtype: DTypeLike = np.int64) -> gs.Constant:
        return gs.Constant(f"{self.name}/{said}", np.array(value, dtype))


def _sweep(graph: gs.Graph) -> None:
    """Removes nodes whose outputs nobody reads; the order of the others stays."""
    kept = []
    outputs = {id(o) for o in graph.outputs}
    for node in reversed(graph.nodes):
        if any(v.outputs or id(v) in outputs for v in node.outputs):
            kept.append(node)
        else:
            node.inputs.clear()
            node.outputs.clear()
    graph.nodes[:] = reversed(kept)
