"""Weights side by side, as one product has them: floats by a Concat that the builder folds, others byte by byte."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes  # noqa: F401  teaches np.dtype "bfloat16"
import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, numpy_helper
from onnx.helper import get_attribute_value, make_node

from llmexport.export.packed.engine_form import run_of
from llmexport.export.packed.given import Given
from llmexport.plugins.dtypes import BY_ONNX

FLOATS: dict[int, int] = {TensorProto.FLOAT: 4, TensorProto.FLOAT16: 2, TensorProto.BFLOAT16: 2}  # bytes of each
MAKERS = ("Transpose", "Cast", "DequantizeLinear")  # what makes a weight of a stored one


@dataclass(frozen=True)
class Weight:
    """A value that weights alone make; `packed` says how, if it is dequantised."""

    shape: tuple[int, ...]
    dtype: int
    packed: str = ""


class Weights:
    """Those of a graph, whose nodes are found by their outputs; `given` are constants of other bytes than they say, and
    files of others lie in `folder`."""

    def __init__(self, graph: GraphProto, makers: Mapping[str, NodeProto], given: list[Given], folder: Path) -> None:
        self._graph, self._makers, self._folder = graph, makers, folder
        self._stored = {t.name: t for t in graph.initializer}
        self._given = {g.name: g for g in given}

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def __getitem__(self, name: str) -> TensorProto:
        return self._stored[name]

    def add(self, tensor: TensorProto) -> str:
        self._graph.initializer.append(tensor)
        self._stored[tensor.name] = self._graph.initializer[-1]
        return tensor.name

    def of(self, name: str) -> Weight | None:
        """What a value is: a stored weight, or one that is turned, cast, or dequantised by scales of its rows."""
        if stored := self._stored.get(name):
            return Weight(tuple(stored.dims), stored.data_type)
        node = self._makers.get(name)
        source = self.of(node.input[0]) if node and node.op_type in MAKERS else None
        if node is None or source is None:
            return None
        said = {a.name: get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Transpose":
            axes = said.get("perm", range(len(source.shape))[::-1])
            return replace(source, shape=tuple(source.shape[i] for i in axes), packed=_then(source.packed, "turned"))
        if node.op_type == "Cast":
            return replace(source, dtype=said["to"], packed=_then(source.packed, str(said["to"])))
        return self._dequantised(node, source, said.get("axis", 1), said.get("block_size", 0))

    def _dequantised(self, node: NodeProto, source: Weight, axis: int, block: int) -> Weight | None:
        """None where other rows have other zero points, or the same scale, or bytes that do not lie in a file."""
        stored, scales = self._stored.get(node.input[0]), self.of(node.input[1])
        if stored is None or scales is None or len(node.input) > 2 or axis != bool(block):
            return None
        by_rows = len(scales.shape) == 1 + bool(block) and scales.shape[0] == source.shape[0]
        if not by_rows or stored.data_location != TensorProto.EXTERNAL:
            return None
        mask = self._given[stored.name].mask if stored.name in self._given else 0
        how = f"{source.dtype} ^ {mask} by {scales.dtype} {scales.shape[1:]} {scales.packed}"
        return Weight(source.shape, scales.dtype, how)

    def side_by_side(self, names: list[str], spare: int, made: str) -> list[NodeProto]:
        """What makes `made` [K, columns] of these [K, N] that are alike, with `spare` columns of zeros behind them."""
        makers = [self._makers.get(n) for n in names]
        rows = [m.input[0] for m in makers if m and m.op_type == "Transpose"]
        weight = self.of(names[0])
        assert weight is not None
        turned = len(rows) == len(names)
        if spare:
            shape = (spare, weight.shape[0]) if turned else (weight.shape[0], spare)
            (rows if turned else names).append(self.zeros(f"{made}/zeros", shape, weight.dtype))
        if not turned:
            return [make_node("Concat", names, [made], made, axis=1)]
        # The builder copies rows whole, and multiplies by them as they lie.
        return [*self.together(rows, f"{made}/rows"), make_node("Transpose", [f"{made}/rows"], [made], made)]

    def together(self, names: list[str], made: str) -> list[NodeProto]:
        """What makes `made` of tensors one behind another: what makes each of them, or their bytes, or a Concat."""
        makers = [m for n in names if (m := self._makers.get(n))]
        first = makers[0] if len(makers) == len(names) else None
        if first is not None and first.op_type != "Transpose" and all(self._alike(m, first) for m in makers):
            parts = [f"{made}/{i}" for i in range(len(first.input))]
            nodes = [n for i, part in enumerate(parts) for n in self.together([m.input[i] for m in makers], part)]
            node = make_node(first.op_type, parts, [made], made)
            node.attribute.extend(first.attribute)
            return [*nodes, node]
        tensors = [self._stored[n] for n in names if n in self._stored]
        if len(tensors) < len(names) or tensors[0].data_type in FLOATS:
            return [make_node("Concat", names, [made], made, axis=0)]
        # TensorRT takes no other constants of few bits than those that DequantizeLinear reads.
        whole = TensorProto()
        whole.CopyFrom(tensors[0])
        whole.name, whole.dims[0] = made, sum(t.dims[0] for t in tensors)
        parts_given = [self._given.get(t.name, Given(t.name, (run_of(t),))) for t in tensors]
        runs = tuple(run for part in parts_given for run in part.runs)
        self._given[self.add(whole)] = Given(made, runs, parts_given[0].mask)
        return []

    def _alike(self, node: NodeProto, other: NodeProto) -> bool:
        """Whether both do the same with inputs of the same types."""
        types, others = ([w and w.dtype for w in map(self.of, n.input)] for n in (node, other))
        return (node.op_type, types) == (other.op_type, others) and node.attribute == other.attribute

    def stored_together(self, names: list[str], made: str, dtype: int) -> bool:
        """Makes `made` a constant of vectors one behind another, cast as they are; False if one is not stored.

        What the builder computes of constants it would copy at each step to a plugin that it runs by itself.
        """
        vectors = [self.numbers(n) for n in names]
        known = [v for v in vectors if v is not None]
        if len(known) < len(names):
            return False
        target = np.dtype(BY_ONNX[dtype].name)
        values = np.concatenate([v.astype(target) for v in known])
        self.add(TensorProto(name=made, dims=values.shape, data_type=dtype, raw_data=values.tobytes()))
        return True

    def numbers(self, name: str) -> np.ndarray | None:
        """Those of a stored vector of floats, or of one that is cast from float to float; None if it is neither."""
        if stored := self._stored.get(name):
            return self._array(stored) if stored.data_type in FLOATS else None
        node = self._makers.get(name)
        if node is None or node.op_type != "Cast":
            return None
        target = next(a.i for a in node.attribute if a.name == "to")
        source = self.numbers(node.input[0]) if target in FLOATS else None
        return None if source is None else source.astype(np.dtype(BY_ONNX[target].name))

    def _array(self, tensor: TensorProto) -> np.ndarray:
        if tensor.data_location != TensorProto.EXTERNAL:
            return numpy_helper.to_array(tensor)
        held = Given(tensor.name, (run_of(tensor),)).read(self._folder)
        return held.view(BY_ONNX[tensor.data_type].name)

    def zeros(self, name: str, shape: tuple[int, ...], dtype: int) -> str:
        made = TensorProto(name=name, dims=shape, data_type=dtype)
        made.raw_data = bytes(math.prod(shape) * FLOATS[dtype])
        return self.add(made)

    def kept(self, read: set[str]) -> list[Given]:
        """Drops the stored weights that nothing reads; returns the constants that are given now."""
        tensors = [t for t in self._graph.initializer if t.name in read]
        del self._graph.initializer[:]
        self._graph.initializer.extend(tensors)
        return [g for g in self._given.values() if g.name in read]


def _then(packed: str, how: str) -> str:
    return f"{packed}, {how}" if packed else ""
