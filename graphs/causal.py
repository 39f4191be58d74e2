"""Whether a mask is causal, as the graph that makes it tells."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from llmexport.graphs.fusion import produced_by, producer, scalar


def is_causal(mask: gs.Tensor, length: gs.Tensor, slots: int) -> bool:
    """Whether a mask [B, 1, T, S] of so many slots shows no key behind the query's own slot, which is length + t.

    It is read through And, of which one side must be so, Or, of which both must, and Unsqueeze, down to a comparison of
    the slots' numbers with the queries'. False as well where that does not tell.
    """
    node = producer(mask)
    if node is None or node.domain:
        return False
    match node.op:
        case "Unsqueeze":
            return is_causal(node.inputs[0], length, slots)
        case "And":
            return any(is_causal(v, length, slots) for v in node.inputs)
        case "Or":
            return all(is_causal(v, length, slots) for v in node.inputs)
        case "LessOrEqual" | "Equal":
            return _numbers(node.inputs[0], slots) and _own_slots(node.inputs[1], length)
    return False


def _numbers(value: gs.Tensor, slots: int) -> bool:
    """Whether it is 0, 1, ... along the last axis."""
    return isinstance(value, gs.Constant) and np.array_equal(value.values, np.arange(slots).reshape(1, 1, -1))


def _own_slots(value: gs.Tensor, length: gs.Tensor) -> bool:
    """Whether it is length + t [B, T, 1]."""
    apart = produced_by(value, "Unsqueeze")
    total = produced_by(apart.inputs[0], "Add") if apart and _axis(apart) == 2 else None
    if total is None:
        return False
    row, steps = (produced_by(v, op) for v, op in zip(total.inputs, ("Unsqueeze", "Range"), strict=True))
    if row is None or steps is None or _axis(row) != 1 or row.inputs[0] is not length:
        return False
    return [scalar(steps.inputs[i]) for i in (0, 2)] == [0, 1]


def _axis(unsqueeze: gs.Node) -> float | None:
    return scalar(unsqueeze.inputs[1])
