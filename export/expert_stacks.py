"""Stacks of experts' weights with more experts behind them, which the builder puts together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, numpy_helper
from onnx.helper import get_attribute_value, make_node


@dataclass(frozen=True)
class Stack:
    """A matrix of each expert, `shape` [E, rows, columns]: a tensor that is the whole, or tensors of rows."""

    tensors: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: int
    is_whole: bool


class Stacks:
    """Those of a graph, and longer ones, whose nodes are `made` and whose constants are added to the graph."""

    def __init__(self, graph: GraphProto, makers: Mapping[str, NodeProto]) -> None:
        self._graph, self._makers = graph, makers
        self._constants = {t.name: t for t in graph.initializer}
        self.made: list[NodeProto] = []

    def of(self, name: str) -> Stack | None:
        """None where a value is neither a constant, nor constants of rows that a Concat puts together."""
        if stored := self._constants.get(name):
            return Stack((name,), tuple(stored.dims), stored.data_type, is_whole=True)
        whole = self._makers.get(name)
        rows = self._makers.get(whole.input[0]) if whole is not None and whole.op_type == "Reshape" else None
        shape = self._constants.get(whole.input[1]) if whole is not None else None
        if rows is None or shape is None or rows.op_type != "Concat" or attributes_of(rows)["axis"] != 0:
            return None
        tensors = [t for n in rows.input if (t := self._constants.get(n)) and len(t.dims) == 2]
        if len(tensors) < len(rows.input):
            return None
        sizes = tuple(numpy_helper.to_array(shape).tolist())
        return Stack(tuple(rows.input), sizes, tensors[0].data_type, is_whole=False)

    def linear(self, name: str) -> TensorProto | None:
        """The tensor [out, in] that a product's weight is the transpose of, cast or not."""
        turn = self._makers.get(name)
        if turn is None or turn.op_type != "Transpose" or attributes_of(turn).get("perm", [1, 0]) != [1, 0]:
            return None
        cast = self._makers.get(turn.input[0])
        stored = self._constants.get(cast.input[0] if cast is not None and cast.op_type == "Cast" else turn.input[0])
        return stored if stored is not None and len(stored.dims) == 2 else None

    def gate_up(self, halves: Sequence[TensorProto], count: int, said: Mapping[str, Any], name: str) -> list[str]:
        """Rows of `count` experts of which gate and up [count I, C] are made, by the attributes of MoeExperts."""
        names, [width, hidden] = [t.name for t in halves], halves[0].dims
        if count == 1 and not (said["transposed"] or said["interleaved"]):
            return names
        size, axis = width // count, 2 if said["interleaved"] else 1
        shape = [count, size, hidden]
        shape.insert(axis, 1)
        parts = [self._shaped(half, shape, f"{name}/{i}") for i, half in enumerate(names)]
        both = self._make("Concat", parts, f"{name}/both", axis=axis)
        if not said["transposed"]:
            return [self._shaped(both, [-1, hidden], f"{name}/rows")]
        each = self._shaped(both, [count, 2 * size, hidden], f"{name}/each")
        turned = self._make("Transpose", [each], f"{name}/turned", perm=[0, 2, 1])
        return [self._shaped(turned, [-1, 2 * size], f"{name}/rows")]

    def down(self, down: TensorProto, count: int, said: Mapping[str, Any], name: str) -> list[str]:
        """Rows of `count` experts of which down [C, count I] is made."""
        hidden, width = down.dims
        if count == 1 and not said["transposed"]:
            return [down.name]
        each = self._shaped(down.name, [hidden, count, width // count], f"{name}/each")
        perm, columns = ([1, 2, 0], hidden) if said["transposed"] else ([1, 0, 2], width // count)
        turned = self._make("Transpose", [each], f"{name}/turned", perm=perm)
        return [self._shaped(turned, [-1, columns], f"{name}/rows")]

    def longer(self, stack: Stack, rows: list[str], count: int, name: str) -> str:
        """The stack with `count` experts of these rows behind it, as a value of this name."""
        experts, *matrix = stack.shape
        own = [*stack.tensors]
        if stack.is_whole:
            own = [self._shaped(own[0], [-1, matrix[-1]], f"{name}/own")]
        every = self._make("Concat", [*own, *rows], f"{name}/every", axis=0)
        return self._shaped(every, [experts + count, *matrix], name)

    def _shaped(self, value: str, shape: list[int], name: str) -> str:
        self._graph.initializer.append(numpy_helper.from_array(np.array(shape), f"{name}/shape"))
        return self._make("Reshape", [value, f"{name}/shape"], name)

    def _make(self, kind: str, inputs: list[str], name: str, **said: Any) -> str:
        self.made.append(make_node(kind, inputs, [name], name, **said))
        return name


def attributes_of(node: NodeProto) -> dict[str, Any]:
    return {a.name: get_attribute_value(a) for a in node.attribute}
