"""Whole numbers as sums of others, as the graph that makes them tells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs

from llmexport.graphs.fusion import producer

SAME = {"Cast", "Identity", "Squeeze", "Unsqueeze"}
SIGNS = {"Add": 1, "Sub": -1}
Sum = Mapping[str, int]  # how often each value is in it, by name, or dimension of a shape, by that; and "", a number


def sum_of(value: gs.Tensor) -> Sum:
    """Of a value of whole numbers: what it is the sum of, row by row; itself, where the graph does not tell.

    Read through Add, Sub, what changes neither number nor row, and a Shape of one dimension. Two sums of the same terms
    are the same number; others need not differ.
    """
    total = Counter[str]()
    waiting = [(value, 1)]
    while waiting:
        term, times = waiting.pop()
        node = producer(term)
        if isinstance(term, gs.Constant):
            # Of several numbers it is a term of its own.
            numbers = np.unique(term.values)
            total["" if len(numbers) == 1 else term.name] += times * (int(numbers[0]) if len(numbers) == 1 else 1)
        elif node is None or node.domain:
            total[term.name] += times
        elif node.op in SIGNS:
            waiting += [(node.inputs[0], times), (node.inputs[1], times * SIGNS[node.op])]
        elif node.op in SAME:
            waiting.append((node.inputs[0], times))
        elif node.op == "Shape" and (shape := node.inputs[0].shape) is not None:
            dimensions = shape[node.attrs.get("start", 0) : node.attrs.get("end")]
            _add(total, dimensions[0] if len(dimensions) == 1 else term.name, times)
        else:
            total[term.name] += times
    return {name: times for name, times in total.items() if times}


def plus(total: Sum, dimension: int | str) -> Sum:
    """The sum and a dimension of a shape."""
    more = Counter(total)
    _add(more, dimension, 1)
    return {name: times for name, times in more.items() if times}


def _add(total: Counter[str], dimension: int | str, times: int) -> None:
    if isinstance(dimension, int):
        total[""] += times * dimension
    else:
        total[dimension] += times
