"""Fuses the activation of a gated MLP with the product that it gates."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from llmexport.graphs.fusion import (
    Fused,
    Refusal,
    check_operands,
    fuse_each,
    is_output,
    other_input,
    produced_by,
    replace,
    same_shape,
    sole_consumer,
)

GELU = {"none": "gelu_erf", "tanh": "gelu_tanh"}


def fuse_gated_act(graph: gs.Graph) -> Fused:
    """Rewrites every legal act(gate) * up, and names the activations that it leaves.

        gate        gate --------+           gate    up
          |           |          |              \\   /
        Gelu    or  Sigmoid      |       =>   GatedAct
          |           |          |                |
          |          Mul --------+                y
          |           |
          +-----+-----+
                |
               Mul --- up
                |
                y

        both                             both
          |                               |
        Split (last axis)       =>     GatedAct
         |   |                            |
      gate   up - as above - y            y

    where nothing else reads gate and up, which are equal halves in this order: the op reads them where they lie.
    Products are taken in either order. Legal if
    1. a Sigmoid is multiplied with its own input, which makes it SiLU, and is read by nothing else,
    2. the activation has one consumer, a Mul, and is no graph output,
    3. gate and up have one shape, nothing is broadcast; both are of one float type and of rank 3.
    """
    return fuse_each(graph, ("Gelu", "Sigmoid"), _fuse)


def _fuse(graph: gs.Graph, node: gs.Node) -> None:
    gate, active = node.inputs[0], node.outputs[0]
    dead = [node]
    if node.op == "Gelu":
        activation = GELU[node.attrs.get("approximate", "none")]
    else:
        activation = "silu"
        active = _silu(graph, node).outputs[0]
        dead.append(active.inputs[0])
    product = _read_once(graph, active, "the activation")
    if product.op != "Mul" or product.domain:
        raise Refusal(f"the activation goes to {product.op}, not to a product")
    up = other_input(product, active)
    if not same_shape(gate, up):
        raise Refusal("gate and up differ in shape")
    check_operands(gate, up)
    inputs, split = [gate, up], produced_by(gate, "Split")
    if split is not None and _is_of_halves(graph, split, gate, up, [*dead, product]):
        inputs = split.inputs[:1]
        dead.append(split)
    attributes = {"activation": activation, "alpha": 0.0, "limit": 0.0}
    replace(product, dead, "GatedAct", inputs, list(product.outputs), attributes)


def _is_of_halves(graph: gs.Graph, split: gs.Node, gate: gs.Tensor, up: gs.Tensor, readers: list[gs.Node]) -> bool:
    """Whether a Split makes gate and up of the last axis of [B, T, 2 I], in this order, for `readers` alone."""
    read = [n for v in (gate, up) for n in v.outputs]
    return (
        [id(v) for v in split.outputs] == [id(gate), id(up)]
        and split.attrs.get("axis", 0) in (-1, 2)
        and len(split.inputs[0].shape or ()) == 3
        and all(any(n is r for r in readers) for n in read)
        and not is_output(graph, gate)
        and not is_output(graph, up)
    )


def _silu(graph: gs.Graph, sigmoid: gs.Node) -> gs.Node:
    """The product that makes a Sigmoid a SiLU."""
    product = _read_once(graph, sigmoid.outputs[0], "the sigmoid")
    if product.op != "Mul" or product.domain or other_input(product, sigmoid.outputs[0]) is not sigmoid.inputs[0]:
        raise Refusal("the sigmoid is not multiplied with its own input")
    return product


def _read_once(graph: gs.Graph, value: gs.Tensor, what: str) -> gs.Node:
    if is_output(graph, value):
        raise Refusal(f"{what} is a graph output")
    return sole_consumer(value, what)
