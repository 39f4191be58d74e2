"""Whole numbers as sums of others, as the graph that makes them tells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from llmexport.graphs.fusion import producer

WHOLE = (np.int32, np.int64)
SAME = {"Identity", "Squeeze", "Unsqueeze"}
SIGNS = {"Add": 1, "Sub": -1}


ONE = 1  # of which a number that is known is a multiple


@dataclass(frozen=True)
class Dimension:
    """A symbolic dimension of a shape, which a value may be called like."""

    name: str


Term = int | str | Dimension  # ONE, the name of a value, or a dimension
Sum = Mapping[Term, int]  # how often each term is in it


def sum_of(value: gs.Tensor) -> Sum:
    """Of a value of whole numbers: what it is the sum of, row by row; itself, where the graph does not tell.

    Read through Add, Sub, what changes neither number nor order, and a Shape of one dimension. Two sums of the same
    terms are the same numbers, if they have the same shape; others need not differ.
    """
    total = Counter[Term]()
    waiting = [(value, 1)]
    while waiting:
        term, times = waiting.pop()
        node = producer(term)
        if isinstance(term, gs.Constant) and term.dtype in WHOLE and len(np.unique(term.values)) == 1:
            total[ONE] += times * int(np.unique(term.values)[0])
        elif node is None or node.domain or term.dtype not in WHOLE:
            total[term.name] += times
        elif node.op in SIGNS:
            waiting += [(node.inputs[0], times), (node.inputs[1], times * SIGNS[node.op])]
        elif node.op in SAME or (node.op == "Cast" and node.inputs[0].dtype in WHOLE):
            waiting.append((node.inputs[0], times))
        elif node.op == "Shape" and (dimension := _dimension(node)) is not None:
            _add(total, dimension, times)
        else:
            total[term.name] += times
    return {term: times for term, times in total.items() if times}


def plus(total: Sum, dimension: int | str | None) -> Sum | None:
    """The sum and a dimension of a shape; None of one that has no name."""
    if dimension is None:
        return None
    more = Counter(total)
    _add(more, dimension, 1)
    return {term: times for term, times in more.items() if times}


def _dimension(shape: gs.Node) -> int | str | None:
    """The one that a Shape gives, as it is known."""
    whole = shape.inputs[0].shape
    found = [] if whole is None else whole[shape.attrs.get("start", 0) : shape.attrs.get("end")]
    return found[0] if len(found) == 1 else None


def _add(total: Counter[Term], dimension: int | str, times: int) -> None:
    if isinstance(dimension, int):
        total[ONE] += times * dimension
    else:
        total[Dimension(dimension)] += times
