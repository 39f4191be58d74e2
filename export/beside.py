"""Takes the large weights out of a model: each becomes an input, with the binding that makes it of stored tensors."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import TensorProto
from onnx.helper import get_attribute_value, make_node, make_tensor_value_info

from llmexport.export.binding import Binding, Operation, Source
from llmexport.export.errors import EngineError
from llmexport.plugins.dtypes import BY_NAME, BY_ONNX

# Bytes from which a weight becomes an input. Norms, biases and convolutions of the widest published models are
# smaller: they stay constants, which TensorRT folds into the layers about them, and together take a few MB.
LARGE = 2**18


Nodes = Any  # a repeated field of NodeProto: of a graph, or of a branch


@dataclass(frozen=True)
class _Made:
    """A value that is made of weights alone: what `binding` makes, or that with its last two axes swapped."""

    name: str
    binding: Binding
    swapped: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.binding.shape) * BY_NAME[self.binding.dtype].bits // 8

    def then(self, do: Operation, dtype: str, shape: tuple[int, ...]) -> _Made:
        binding = Binding(dtype, shape, self.binding.sources, (*self.binding.operations, do))
        return dataclasses.replace(self, binding=binding)

    def cast(self, dtype: str) -> _Made:
        return self.then(Operation("cast", dtype), dtype, self.binding.shape)

    def reshape(self, shape: tuple[int, ...]) -> _Made:
        return self.then(Operation("reshape", shape), self.binding.dtype, shape)

    def transpose(self, axes: tuple[int, ...]) -> _Made:
        return self.then(Operation("transpose", axes), self.binding.dtype, tuple(self.binding.shape[a] for a in axes))

    @property
    def in_order(self) -> _Made:
        """The same value, where the binding swaps the axes."""
        if not self.swapped:
            return self
        return dataclasses.replace(self.transpose(_swap(len(self.binding.shape))), swapped=False)


@dataclass(frozen=True)
class _Use:
    """A node that reads a value as its input `place`; `inside` a branch or a loop, or in the graph itself."""

    node: onnx.NodeProto
    place: int
    inside: bool


def beside(model: onnx.ModelProto, large: int) -> dict[str, Binding]:
    """Makes a graph input of whatever is made of weights alone and takes `large` bytes, in place; returns the binding
    of each, by name.

    What makes it (a Cast of bf16 weights, a Concat of experts) is left to the binding. Only the Transpose before a
    MatMul stays a node, of an input that has the rank of the product: so the stored bytes can be bound, and TensorRT
    reads them either way round (engine_weights.py). It takes uint8 nowhere but in a Cast: bytes become int8. Raises
    EngineError if such a weight is made as no binding can.
    """
    graph = model.graph
    made, makers = _follow(graph, large)
    uses: dict[str, list[_Use]] = defaultdict(list)
    for use in _uses(n for n in graph.node if n.output[0] not in makers):
        uses[use.node.input[use.place]].append(use)
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in (*graph.input, *graph.value_info)}
    forms = {n: _form(m, uses[n], ranks) for n, m in made.items() if n in uses and m.nbytes >= large}
    leads: dict[Binding, int] = defaultdict(int)
    for form, lead in forms.values():
        leads[form.binding] = max(lead, leads[form.binding])
    _drop(graph, makers, forms.keys())
    taken = {v.name for v in (*graph.input, *graph.initializer)} | {n for node in graph.node for n in node.output}
    names: dict[Binding, str] = {}
    renamed: dict[str, str] = {}
    swaps: list[onnx.NodeProto] = []
    for value, (form, lead) in forms.items():
        if not lead and leads[form.binding] and all(map(_takes_rows, uses[value])):
            # A table that is the embedding and the head is bound once, as the head has it.
            lead = leads[form.binding]
            _shift(graph, {use.node.output[0] for use in uses[value]}, lead)
        binding = form.reshape((1,) * lead + form.binding.shape).binding if lead else form.binding
        if binding not in names:
            names[binding] = next(n for n in (form.name, f"{form.name}/{binding.dtype}", value) if n not in taken)
            taken.add(names[binding])
        if form.swapped:
            perm = _swap(len(binding.shape))
            swaps.append(make_node("Transpose", [names[binding]], [value], f"{value}/swap", perm=perm))
        else:
            renamed[value] = names[binding]
    _rename(graph.node, renamed)
    nodes = [*swaps, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    bindings = {name: _signed(graph.node, name, binding) for binding, name in names.items()}
    typed = [v for v in graph.value_info if v.name not in bindings]
    del graph.value_info[:]
    graph.value_info.extend(typed)
    graph.input.extend(make_tensor_value_info(n, BY_NAME[b.dtype].onnx, b.shape) for n, b in bindings.items())
    return bindings


def _follow(graph: onnx.GraphProto, large: int) -> tuple[dict[str, _Made], set[str]]:
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


def _stored(tensor: TensorProto) -> _Made:
    said = {entry.key: entry.value for entry in tensor.external_data}
    dtype, shape = BY_ONNX[tensor.data_type].name, tuple(tensor.dims)
    source = Source(tensor.name, said["location"], int(said["offset"]), dtype, shape)
    return _Made(tensor.name, Binding(dtype, shape, (source,), ()))


def _step(node: onnx.NodeProto, made: Mapping[str, _Made], numbers: Mapping[str, TensorProto]) -> _Made | None:
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
            if perm == _swap(len(perm)):
                return dataclasses.replace(first, swapped=not first.swapped)
            return first.in_order.transpose(perm)
        case "Reshape" if node.input[1] in numbers:
            ordered = first.in_order
            shape = onnx.numpy_helper.to_array(numbers[node.input[1]]).tolist()
            known = [ordered.binding.shape[i] if d == 0 else d for i, d in enumerate(shape)]
            rest = math.prod(ordered.binding.shape) // -math.prod(known)
            named = dataclasses.replace(ordered, name=node.output[0]) if len(ordered.binding.sources) > 1 else ordered
            return named.reshape(tuple(rest if d == -1 else d for d in known))
        case "Concat":
            return _joined([made[n] for n in node.input if n in made], len(node.input), said["axis"], node.output[0])
    return None


def _joined(parts: list[_Made], count: int, axis: int, name: str) -> _Made | None:
    """Stored tensors, all of the `count` there are, one behind the other."""
    shapes = [p.binding.shape for p in parts]
    dtypes = {p.binding.dtype for p in parts}
    if len(parts) < count or len(dtypes) > 1 or any(p.binding.operations or p.swapped for p in parts):
        return None
    shape = list(shapes[0])
    shape[axis] = sum(s[axis] for s in shapes)
    sources = tuple(p.binding.sources[0] for p in parts)
    return _Made(name, Binding(dtypes.pop(), tuple(shape), sources, (Operation("concat", axis),)))


def _form(made: _Made, uses: list[_Use], ranks: Mapping[str, int]) -> tuple[_Made, int]:
    """How a value is bound, and how many axes of 1 lead it so that it has the rank of the products that read it."""
    rank = len(made.binding.shape)
    of_products = {
        ranks.get(u.node.input[0], 0) if u.node.op_type == "MatMul" and u.place == 1 and not u.inside else 0
        for u in uses
    }
    wanted = of_products.pop()
    if of_products or wanted < rank:
        return made.in_order, 0
    return made, wanted - rank


def _uses(nodes: Iterable[onnx.NodeProto], inside: bool = False) -> Iterator[_Use]:
    for node in nodes:
        yield from (_Use(node, place, inside) for place, name in enumerate(node.input) if name)
        for attribute in node.attribute:
            yield from _uses(attribute.g.node, inside=True)


def _takes_rows(use: _Use) -> bool:
    axes = [a.i for a in use.node.attribute if a.name == "axis"]
    return use.node.op_type == "Gather" and not use.place and not use.inside and not any(axes)


def _shift(graph: onnx.GraphProto, gathered: Collection[str], lead: int) -> None:
    """Lets the Gathers of these outputs read a table that `lead` axes of 1 lead: the outputs lose them again."""
    nodes = []
    for node in graph.node:
        nodes.append(node)
        if node.output[0] in gathered:
            del node.attribute[:]
            node.attribute.append(onnx.helper.make_attribute("axis", lead))
            rows, node.output[0] = node.output[0], f"{node.output[0]}/led"
            axes = f"{rows}/axes"
            graph.initializer.append(onnx.helper.make_tensor(axes, TensorProto.INT64, [lead], range(lead)))
            nodes.append(make_node("Squeeze", [node.output[0], axes], [rows], f"{rows}/squeeze"))
    del graph.node[:]
    graph.node.extend(nodes)


def _drop(graph: onnx.GraphProto, makers: Collection[str], bound: Collection[str]) -> None:
    """Drops the makers and the weights that nothing reads any more when the values `bound` are inputs."""
    read = {v.name for v in graph.output}
    kept = []
    for node in reversed(graph.node):
        if node.output[0] in makers and read.isdisjoint(node.output):
            continue
        kept.append(node)
        read |= {use.node.input[use.place] for use in _uses([node])}.difference(bound)
    weights = [t for t in graph.initializer if t.name in read]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(reversed(kept))
    graph.initializer.extend(weights)


def _rename(nodes: Iterable[onnx.NodeProto], names: Mapping[str, str]) -> None:
    for use in _uses(nodes):
        name = use.node.input[use.place]
        use.node.input[use.place] = names.get(name, name)


def _signed(nodes: Nodes, name: str, binding: Binding) -> Binding:
    """The same bytes as int8; the nodes then add 256 to what is negative where they cast it."""
    if binding.dtype != "uint8":
        return binding
    _restore_bytes(nodes, name)
    sources = tuple(dataclasses.replace(s, dtype="int8") for s in binding.sources)
    return dataclasses.replace(binding, dtype="int8", sources=sources)


def _restore_bytes(nodes: Nodes, name: str) -> None:
    """Behind each Cast of rows of the bytes `name`. Raises EngineError if they are read in another way."""
    rows = {n.output[0] for n in nodes if n.op_type == "Gather" and n.input[0] == name}
    restored = []
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _restore_bytes(attribute.g.node, name)
        restored.append(node)
        read_here = name in node.input and node.output[0] not in rows
        if rows.isdisjoint(node.input) and not read_here:
            continue
        if node.op_type != "Cast":
            raise EngineError(f"{node.name}: {node.op_type} of the bytes {name} is none that TensorRT takes")
        to = get_attribute_value(node.attribute[0])
        signed, base = f"{node.output[0]}/signed", f"{node.output[0]}/base"
        restored.append(make_node("Constant", [], [base], base, value=onnx.helper.make_tensor(base, to, [], [256])))
        restored.append(make_node("Mod", [signed, base], [node.output[0]], f"{node.output[0]}/unsigned"))
        node.output[0] = signed
    del nodes[:]
    nodes.extend(restored)


def _swap(rank: int) -> tuple[int, ...]:
    return (*range(rank - 2), rank - 1, rank - 2)
