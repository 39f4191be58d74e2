"""Whether a mask is causal, as the graph that makes it tells."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from llmexport.graphs.fusion import produced_by, producer, scalar

HIDDEN = -(2.0**15)  # a bias that leaves nothing of a key beside any other


def is_causal(mask: gs.Tensor, length: gs.Tensor, slots: int) -> bool:
    """Whether a mask [B, 1, T, S] of so many slots shows no key behind the query's own slot, which is length + t.

    It is read through And, of which one side must be so, Or, of which both must, Unsqueeze, and a Where that makes a
    bias of what is shown and hides the rest, down to a comparison of the slots' numbers with the queries'. False as
    well where that does not tell.
    """
    op, inputs = _made_by(mask)
    match op:
        case "And":
            return any(is_causal(v, length, slots) for v in inputs)
        case "Or":
            return all(is_causal(v, length, slots) for v in inputs)
        case "Where":
            hidden = scalar(inputs[2])
            return hidden is not None and hidden <= HIDDEN and is_causal(inputs[0], length, slots)
        case "LessOrEqual" | "Equal":
            return _numbers(inputs[0], slots, length) and _own_slots(inputs[1], length)
    return False


def window_of(mask: gs.Tensor, length: gs.Tensor, slots: int) -> int | None:
    """How many of the last keys up to a query's own a causal mask as above may show it; None where it tells of none."""
    op, inputs = _made_by(mask)
    match op:
        case "And" | "Or":
            found = [window_of(v, length, slots) for v in inputs]
            known = [n for n in found if n is not None]
            return min(known, default=None) if op == "And" else None if None in found else max(known)
        case "Equal" if is_causal(mask, length, slots):
            return 1
        case "Greater" if _numbers(inputs[0], slots, length):
            first = produced_by(inputs[1], "Sub")
            size = scalar(first.inputs[1]) if first and _own_slots(first.inputs[0], length) else None
            return None if size is None else int(size)
    return None


def hides_rows_alone(mask: gs.Tensor, length: gs.Tensor, slots: int) -> bool:
    """Whether a causal mask as above hides, of what is not behind a query, only what is before a row's first key: then
    a row that shows slot 0 to its last query hides nothing. False as well where that does not tell."""
    op, inputs = _made_by(mask)
    if op == "Or":
        # A query's own key is shown where its row hides all.
        others = [v for v in inputs if _made_by(v)[0] != "Equal" or not is_causal(v, length, slots)]
        return len(others) == 1 and hides_rows_alone(others[0], length, slots)
    others, waiting = [], [mask]
    while waiting:
        value = waiting.pop()
        op, inputs = _made_by(value)
        if op == "And":
            waiting += inputs
        # A window of as many keys as there are slots hides none.
        elif (op != "LessOrEqual" or not is_causal(value, length, slots)) and (
            window_of(value, length, slots) or 0
        ) < slots:
            others.append(value)
    op, inputs = _made_by(others[0]) if len(others) == 1 else ("", [])
    return op == "GreaterOrEqual" and _numbers(inputs[0], slots, length) and list(inputs[1].shape or ())[1:] == [1, 1]


def _made_by(mask: gs.Tensor) -> tuple[str, list[gs.Tensor]]:
    """The standard operator that makes a mask, seen through Unsqueeze, and what it reads; "" where none does."""
    node = producer(mask)
    if node is None or node.domain:
        return "", []
    return _made_by(node.inputs[0]) if node.op == "Unsqueeze" else (node.op, [*node.inputs])


def past_of(mask: gs.Tensor) -> gs.Tensor | None:
    """The length that the first query of a causal mask as above is counted from; None where it does not tell."""
    waiting = [mask]
    while waiting:
        op, inputs = _made_by(waiting.pop())
        if op in ("And", "Or", "Where"):
            waiting += inputs
        elif op == "LessOrEqual" and (row := _first_own_slot(inputs[1])) is not None:
            return row
    return None


def _numbers(value: gs.Tensor, slots: int, length: gs.Tensor) -> bool:
    """Whether it is the keys' numbers along the last axis: 0, 1, ... [1, 1, S], of which the trace leaves a Reshape if
    there are many; or, of keys that are joined to so many slots, those from length - slots on [B, 1, slots + T]."""
    if (total := produced_by(value, "Add")) is not None:
        behind, steps = (produced_by(v, op) for v, op in zip(total.inputs, ("Sub", "Range"), strict=True))
        if behind is None or steps is None or [scalar(steps.inputs[i]) for i in (0, 2)] != [0, 1]:
            return False
        row = produced_by(behind.inputs[0], "Reshape") or produced_by(behind.inputs[0], "Unsqueeze")
        alone = list(behind.inputs[0].shape or ())[1:] == [1, 1]
        return alone and row is not None and row.inputs[0] is length and scalar(behind.inputs[1]) == slots
    shaped = produced_by(value, "Reshape")
    given = shaped.inputs[0] if shaped else value
    if not isinstance(given, gs.Constant) or list(value.shape or ()) != [1, 1, slots]:
        return False
    return np.array_equal(given.values.ravel(), np.arange(slots))


def _own_slots(value: gs.Tensor, length: gs.Tensor) -> bool:
    """Whether it is length + t [B, T, 1]."""
    return _first_own_slot(value) is length


def _first_own_slot(value: gs.Tensor) -> gs.Tensor | None:
    """The [B] that it is the sum of with t [B, T, 1], if it is."""
    apart = produced_by(value, "Unsqueeze")
    total = produced_by(apart.inputs[0], "Add") if apart and _axis(apart) == 2 else None
    if total is None:
        return None
    row, steps = (produced_by(v, op) for v, op in zip(total.inputs, ("Unsqueeze", "Range"), strict=True))
    if row is None or steps is None or _axis(row) != 1:
        return None
    return row.inputs[0] if [scalar(steps.inputs[i]) for i in (0, 2)] == [0, 1] else None


def _axis(unsqueeze: gs.Node) -> float | None:
    return scalar(unsqueeze.inputs[1])
