"""Matrices in few bits as TensorRT keeps them packed: signed constants, unturned, that DequantizeLinear reads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

import numpy as np
import onnx
from onnx import TensorProto
from onnx.helper import get_attribute_value, make_node

from llmexport.export.packed import fp4
from llmexport.export.packed.given import Given, Run
from llmexport.export.packed.matrix import Matrix
from llmexport.plugins.dtypes import BY_ONNX

# What unsigned numbers are as signed ones once all their bytes are changed by this mask: each less its middle.
SIGNED: dict[int, tuple[int, int]] = {
    TensorProto.UINT4: (TensorProto.INT4, 0x88),
    TensorProto.UINT8: (TensorProto.INT8, 0x80),
}


# The compute capability from which GPUs have numbers of a type; TensorRT builds for no other that it is told of.
NEEDS: Mapping[str, tuple[int, int]] = MappingProxyType({"float8_e4m3fn": (8, 9), "float4_e2m1fn": (10, 0)})


def needs(matrices: Iterable[Matrix]) -> tuple[tuple[int, int], str] | None:
    """The compute capability that engines of these need, and the type that needs it; None if any will do."""
    return max(((NEEDS[kind], kind) for kind in {m.number for m in matrices} if kind in NEEDS), default=None)


def engine_form(model: onnx.ModelProto) -> list[Given]:
    """Rewrites the nodes that make matrices, in place; returns the constants to be given otherwise than they lie."""
    joined = _joined(model.graph)
    if not any(n.op_type in ("DequantizeLinear", fp4.NAME) for n in model.graph.node):
        return joined
    form = _Form(model)
    kept: list[onnx.NodeProto] = []
    read = {o.name for o in model.graph.output}
    for node in reversed([new for old in model.graph.node for new in form.of(old)]):
        # What turned a matrix or made its middle is read no more.
        if read.isdisjoint(node.output) and form.constant(node.output[0]):
            continue
        kept.append(node)
        read.update(node.input)
    del model.graph.node[:]
    model.graph.node.extend(kept[::-1])
    functions = [f for f in model.functions if f.domain != fp4.DOMAIN]
    del model.functions[:]
    model.functions.extend(functions)
    return joined + form.flipped


def _joined(graph: onnx.GraphProto) -> list[Given]:
    """Makes one constant of bytes that lie apart and are read one behind the other, which TensorRT does not join."""
    held = {t.name: t for t in graph.initializer}
    readers = {n: node for node in graph.node for n in node.input}
    given: list[Given] = []
    apart, made = set[str](), set[str]()
    for node in graph.node:
        parts = [t for n in node.input if (t := held.get(n)) and t.data_type == TensorProto.UINT8]
        if node.op_type != "Concat" or len(parts) < len(node.input):
            continue
        value, shape = node.output[0], [sum(t.dims[0] for t in parts), *parts[0].dims[1:]]
        if (reader := readers[value]).op_type == "Reshape":
            value, shape = reader.output[0], onnx.numpy_helper.to_array(held[reader.input[1]]).tolist()
        given.append(Given(value, tuple(map(run_of, parts))))
        apart.update(node.input)
        made |= {node.output[0], value}
        whole = TensorProto(name=value, data_type=TensorProto.UINT8, dims=shape, data_location=TensorProto.EXTERNAL)
        # Of the bytes that are given in their place, not of this file.
        whole.external_data.extend(parts[0].external_data)
        graph.initializer.append(whole)
    if not given:
        return []
    kept = [n for n in graph.node if n.output[0] not in made]
    tensors = [t for t in graph.initializer if t.name not in apart]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(kept)
    graph.initializer.extend(tensors)
    return given


def run_of(tensor: TensorProto) -> Run:
    said = {e.key: e.value for e in tensor.external_data}
    return Run(said["location"], int(said["offset"]), math.prod(tensor.dims) * BY_ONNX[tensor.data_type].bits // 8)


class _Form:
    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.held = {t.name: t for t in model.graph.initializer}
        self.made = {n.output[0]: n for n in model.graph.node}
        self.flipped: list[Given] = []

    def constant(self, name: str) -> bool:
        node = self.made.get(name)
        return node is not None and all(i in self.held or self.constant(i) for i in node.input)

    def of(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """What stands in the place of a node."""
        if node.op_type == fp4.NAME and node.domain == fp4.DOMAIN:
            yield self._fp4(node)
        elif node.op_type == "DequantizeLinear" and self._integers(node):
            yield from self._dequantised(node)
        else:
            yield node

    def _fp4(self, node: onnx.NodeProto) -> onnx.NodeProto:
        numbers, [size] = self.held[node.input[0]], get_attribute_value(node.attribute[0])
        numbers.data_type = TensorProto.FLOAT4E2M1
        numbers.dims[1] *= 2
        return make_node("DequantizeLinear", node.input, node.output, node.name, axis=1, block_size=size)

    def _stored(self, name: str) -> tuple[TensorProto | None, bool]:
        """The constant that a value is or is the transpose of, and whether it is that."""
        made = self.made.get(name)
        if made is not None and made.op_type == "Transpose":
            return self.held.get(made.input[0]), True
        return self.held.get(name), False

    def _integers(self, node: onnx.NodeProto) -> bool:
        """Whether TensorRT would not take what it dequantises: the transpose of a constant, or unsigned numbers."""
        numbers, turned = self._stored(node.input[0])
        return numbers is not None and (turned or numbers.data_type in SIGNED)

    def _dequantised(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        said = {a.name: get_attribute_value(a) for a in node.attribute}
        numbers, turned = self._stored(node.input[0])
        assert numbers is not None
        self._sign(numbers)
        scales = node.input[1]
        # Those that are made say the middle, which a signed number is without one.
        points = self.held.get(node.input[2]) if len(node.input) > 2 else None
        value = node.output[0]
        made = f"{value}/middle" if points else value
        if turned:
            stands = {**said, "axis": 1 - said["axis"]}
            grid = self.made[scales].input[0] if "block_size" in said else scales
            yield make_node("DequantizeLinear", [numbers.name, grid], [f"{value}/rows"], f"{value}/rows", **stands)
            yield make_node("Transpose", [f"{value}/rows"], [made], made, perm=[1, 0])
        else:
            yield make_node("DequantizeLinear", [numbers.name, scales], [made], made, **said)
        if points:
            yield from self._moved(points, scales, made, value, said.get("block_size"))

    def _moved(
        self, points: TensorProto, scales: str, made: str, value: str, size: int | None
    ) -> Iterator[onnx.NodeProto]:
        """Zero points as what is added to each block, which TensorRT takes where it takes no zero points: the scale
        times how far zero is from the middle."""
        self._sign(points)
        wide = self._constant(f"{value}/one/wide", np.array(1, np.float32))

        def node(kind: str, inputs: list[str], name: str) -> onnx.NodeProto:
            return make_node(kind, inputs, [name], name)

        one, zeros, offset = (f"{value}/{n}" for n in ("one", "zeros", "offset"))
        yield node("CastLike", [wide, scales], one)
        yield node("DequantizeLinear", [points.name, one], zeros)
        yield node("Mul", [zeros, scales], offset)
        if size is None:
            yield node("Sub", [made, offset], value)
            return
        groups, rows = points.dims
        apart = self._constant(f"{value}/apart", np.array([groups, size, rows], np.int64))
        whole = self._constant(f"{value}/whole", np.array([groups * size, rows], np.int64))
        axis = self._constant(f"{value}/axis", np.array([1], np.int64))
        yield node("Unsqueeze", [offset, axis], f"{offset}/apart")
        yield node("Reshape", [made, apart], f"{value}/blocks")
        yield node("Sub", [f"{value}/blocks", f"{offset}/apart"], f"{value}/moved")
        yield node("Reshape", [f"{value}/moved", whole], value)

    def _constant(self, name: str, array: np.ndarray) -> str:
        self.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        return name

    def _sign(self, tensor: TensorProto) -> None:
        """Makes a constant one of signed numbers, each less the middle."""
        if tensor.data_type not in SIGNED:
            return
        tensor.data_type, mask = SIGNED[tensor.data_type]
        self.flipped.append(Given(tensor.name, (run_of(tensor),), mask))
