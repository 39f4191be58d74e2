"""The values of a graph that are made of weights alone, each with the binding that makes it of stored tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import TensorProto
from onnx.helper import get_attribute_value

from llmexport.export.binding import Binding, Operation, Source
from llmexport.export.errors import EngineError
from llmexport.plugins.dtypes import BY_NAME, BY_ONNX


@dataclass(frozen=True)
class Derived:
    """A value that is made of weights alone: what `binding` makes, or that with its last two axes swapped."""

    name: str
    binding: Binding
    swapped: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.binding.shape) * BY_NAME[self.binding.dtype].bits // 8

    def then(self, do: Operation, dtype: str, shape: tuple[int, ...]) -> Derived:
        binding = Binding(dtype, shape, self.binding.sources, (*self.binding.operations, do))
        return dataclasses.replace(self, binding=binding)

    def cast(self, dtype: str) -> Derived:
        return self.then(Operation("cast", dtype), dtype, self.binding.shape)

    def reshape(self, shape: tuple[int, ...]) -> Derived:
        return self.then(Operation("reshape", shape), self.binding.dtype, shape)

    def slice(self, axis: int, first: int, end: int) -> Derived:
        shape = (*self.binding.shape[:axis], end - first, *self.binding.shape[axis + 1 :])
        return self.then(Operation("slice", (axis, first, end)), self.binding.dtype, shape)

    def transpose(self, axes: tuple[int, ...]) -> Derived:
        return self.then(Operation("transpose", axes), self.binding.dtype, tuple(self.binding.shape[a] for a in axes))

    @property
    def in_order(self) -> Derived:
        """The same value, where the binding swaps the axes."""
        if not self.swapped:
            return self
        return dataclasses.replace(self.transpose(swap(len(self.binding.shape))), swapped=False)


def derive(graph: onnx.GraphProto, large: int) -> tuple[dict[str, Derived], set[str]]:
    """The values that a binding can make, and the first output of each node that reads constants alone."""
    constant = {t.name for t in graph.initializer}
    numbers = {t.name: t for t in graph.initializer if t.data_location != TensorProto.EXTERNAL}
    made = {t.name: _stored(t) for t in graph.initializer if t.name not in numbers}
    makers = set()
    for node in graph.node:
        inputs = [n for n in node.input if n]
        if not constant.issuperset(inputs) or any(a.g.node for a in node.attribute):
            continue
        constant.update(node.output)
        makers.add(node.output[0])
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            numbers[node.output[0]] = node.attribute[0].t
        elif new := _step(node, made, numbers):
            made[node.output[0]] = new
        elif odd := [n for n in inputs if n in made and made[n].nbytes >= large]:
            raise EngineError(
                f"{node.name}: {node.op_type} of the weight {odd[0]} cannot be done where it is bound: "
                "build the engine with its weights inside"
            )
    return made, makers


def _stored(tensor: TensorProto) -> Derived:
    said = {entry.key: entry.value for entry in tensor.external_data}
    dtype, shape = BY_ONNX[tensor.data_type].name, tuple(tensor.dims)
    source = Source(tensor.name, said["location"], int(said["offset"]), dtype, shape)
    return Derived(tensor.name, Binding(dtype, shape, (source,), ()))


def _step(node: onnx.NodeProto, made: Mapping[str, Derived], numbers: Mapping[str, TensorProto]) -> Derived | None:
    """What a node makes of weights, if a binding can."""
    first = made.get(node.input[0]) if node.input else None
    if first is None or node.domain:
        return None
    said = {a.name: get_attribute_value(a) for a in node.attribute}
    match node.op_type:
        case "Cast":
            return first.cast(BY_ONNX[said["to"]].name)
        case "Transpose":
            perm = tuple(said["perm"])
            if perm == swap(len(perm)):
                return dataclasses.replace(first, swapped=not first.swapped)
            return first.in_order.transpose(perm)
        case "Reshape" if node.input[1] in numbers:
            ordered = first.in_order
            shape = onnx.numpy_helper.to_array(numbers[node.input[1]]).tolist()
            known = [ordered.binding.shape[i] if d == 0 else d for i, d in enumerate(shape)]
            rest = math.prod(ordered.binding.shape) // -math.prod(known)
            named = dataclasses.replace(ordered, name=node.output[0]) if len(ordered.binding.sources) > 1 else ordered
            return named.reshape(tuple(rest if d == -1 else d for d in known))
        case "Slice" if numbers.keys() >= {*node.input[1:]}:
            said_by_inputs = [onnx.numpy_helper.to_array(numbers[n]).tolist() for n in node.input[1:]]
            return _sliced(dataclasses.replace(first.in_order, name=node.output[0]), *said_by_inputs)
        case "Concat":
            return _joined([made[n] for n in node.input if n in made], len(node.input), said["axis"], node.output[0])
    return None


def _sliced(
    whole: Derived, starts: Sequence[int], ends: Sequence[int], axes: Sequence[int] = (0,), steps: Sequence[int] = (1,)
) -> Derived | None:
    """Neighbours along one axis."""
    if len(starts) != 1 or tuple(steps) != (1,):
        return None
    axis = axes[0] % len(whole.binding.shape)
    first, end, _ = slice(starts[0], ends[0]).indices(whole.binding.shape[axis])
    return whole.slice(axis, first, end)


def _joined(parts: list[Derived], count: int, axis: int, name: str) -> Derived | None:
    """Stored tensors, all of the `count` there are, one behind the other."""
    shapes = [p.binding.shape for p in parts]
    dtypes = {p.binding.dtype for p in parts}
    if len(parts) < count or len(dtypes) > 1 or any(p.binding.operations or p.swapped for p in parts):
        return None
    shape = list(shapes[0])
    shape[axis] = sum(s[axis] for s in shapes)
    sources = tuple(p.binding.sources[0] for p in parts)
    return Derived(name, Binding(dtypes.pop(), tuple(shape), sources, (Operation("concat", axis),)))


def swap(rank: int) -> tuple[int, ...]:
    return (*range(rank - 2), rank - 1, rank - 2)
