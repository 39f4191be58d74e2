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


def window_of(mask: gs.Tensor, length: gs.Tensor, slots: int) -> int | None:
    """How many of the last keys up to a query's own a causal mask as above may show it; None where it tells of none."""
    node = producer(mask)
    if node is None or node.domain:
        return None
    match node.op:
        case "Unsqueeze":
            return window_of(node.inputs[0], length, slots)
        case "And" | "Or":
            found = [window_of(v, length, slots) for v in node.inputs]
            known = [n for n in found if n is not None]
            return min(known, default=None) if node.op == "And" else None if None in found else max(known)
        case "Equal" if is_causal(mask, length, slots):
            return 1
        case "Greater" if _numbers(node.inputs[0], slots):
            first = produced_by(node.inputs[1], "Sub")
            size = scalar(first.inputs[1]) if first and _own_slots(first.inputs[0], length) else None
            return None if size is None else int(size)
    return None


def hides_rows_alone(mask: gs.Tensor, length: gs.Tensor, slots: int) -> bool:
    """Whether a causal mask as above hides, of what is not behind a query, only what is before a row's first key: then
    a row that shows slot 0 to its last query hides nothing. False as well where that does not tell."""
    if apart := produced_by(mask, "Unsqueeze"):
        return hides_rows_alone(apart.inputs[0], length, slots)
    if either := produced_by(mask, "Or"):
        # A query's own key is shown where its row hides all.
        others = [v for v in either.inputs if not (produced_by(v, "Equal") and is_causal(v, length, slots))]
        return len(others) == 1 and hides_rows_alone(others[0], length, slots)
    firsts, waiting = list[gs.Node | None](), [mask]
    while waiting:
        value = waiting.pop()
        if both := produced_by(value, "And"):
            waiting += both.inputs
        elif produced_by(value, "LessOrEqual") and is_causal(value, length, slots):
            continue
        # A window of as many keys as there are slots hides none.
        elif (window_of(value, length, slots) or 0) < slots:
            firsts.append(produced_by(value, "GreaterOrEqual"))
    if len(firsts) != 1 or firsts[0] is None:
        return False
    numbers, first = firsts[0].inputs
    return _numbers(numbers, slots) and list(first.shape or ())[1:] == [1, 1]


def _numbers(value: gs.Tensor, slots: int) -> bool:
    """Whether it is 0, 1, ... along the last axis, [1, 1, S]; of many slots the trace leaves a Reshape."""
    shaped = produced_by(value, "Reshape")
    given = shaped.inputs[0] if shaped else value
    if not isinstance(given, gs.Constant) or list(value.shape or ()) != [1, 1, slots]:
        return False
    return np.array_equal(given.values.ravel(), np.arange(slots))


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
