"""Takes the large weights out of a model: each becomes an input, with the binding that makes it of stored tensors."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import TensorProto
from onnx.helper import get_attribute_value, make_node, make_tensor_value_info

from llmexport.export.binding import Binding
from llmexport.export.derived import Derived, derive, swap
from llmexport.export.errors import EngineError
from llmexport.plugins.dtypes import BY_NAME

# Bytes from which a weight becomes an input. Norms, biases and convolutions of the widest published models are
# smaller: they stay constants, which TensorRT folds into the layers about them, and together take a few MB.
LARGE = 2**18
Repeated = Any  # a field of protobuf that holds several


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
    made, makers = derive(graph, large)
    uses: dict[str, list[_Use]] = defaultdict(list)
    for use in _uses(n for n in graph.node if n.output[0] not in makers):
        uses[use.node.input[use.place]].append(use)
    forms = _forms(graph, {n: m for n, m in made.items() if n in uses and m.nbytes >= large}, uses)
    _drop(graph, makers, forms.keys())
    _shift(
        graph, {u.node.output[0]: lead for n, (_, lead) in forms.items() for u in uses[n] if lead and _takes_rows(u)}
    )
    taken = {v.name for v in (*graph.input, *graph.initializer)} | {n for node in graph.node for n in node.output}
    names: dict[Binding, str] = {}
    renamed: dict[str, str] = {}
    swaps: list[onnx.NodeProto] = []
    for value, (form, lead) in forms.items():
        binding = form.reshape((1,) * lead + form.binding.shape).binding if lead else form.binding
        if binding not in names:
            names[binding] = next(n for n in (form.name, f"{form.name}/{binding.dtype}", value) if n not in taken)
            taken.add(names[binding])
        if form.swapped:
            perm = swap(len(binding.shape))
            swaps.append(make_node("Transpose", [names[binding]], [value], f"{value}/swap", perm=perm))
        else:
            renamed[value] = names[binding]
    _rename(graph.node, renamed)
    _replace(graph.node, [*swaps, *graph.node])
    bindings = {name: _signed(graph.node, name, binding) for binding, name in names.items()}
    _replace(graph.value_info, [v for v in graph.value_info if v.name not in bindings])
    graph.input.extend(make_tensor_value_info(n, BY_NAME[b.dtype].onnx, b.shape) for n, b in bindings.items())
    return bindings


def _forms(
    graph: onnx.GraphProto, wanted: Mapping[str, Derived], uses: Mapping[str, list[_Use]]
) -> dict[str, tuple[Derived, int]]:
    """How each value is bound, and how many axes of 1 lead it then.

    A table that is the embedding and the head is bound once, as the head has it.
    """
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in (*graph.input, *graph.value_info)}
    forms = {n: _form(m, uses[n], ranks) for n, m in wanted.items()}
    leads: dict[Binding, int] = defaultdict(int)
    for form, lead in forms.values():
        leads[form.binding] = max(lead, leads[form.binding])
    return {n: (f, leads[f.binding] if all(map(_takes_rows, uses[n])) else lead) for n, (f, lead) in forms.items()}


def _form(made: Derived, uses: list[_Use], ranks: Mapping[str, int]) -> tuple[Derived, int]:
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


def _shift(graph: onnx.GraphProto, leads: Mapping[str, int]) -> None:
    """Lets the Gathers of these outputs read a table that so many axes of 1 lead: the outputs lose them again."""
    nodes = []
    for node in graph.node:
        nodes.append(node)
        if lead := leads.get(node.output[0]):
            _replace(node.attribute, [onnx.helper.make_attribute("axis", lead)])
            rows, node.output[0] = node.output[0], f"{node.output[0]}/led"
            axes = f"{rows}/axes"
            graph.initializer.append(onnx.helper.make_tensor(axes, TensorProto.INT64, [lead], range(lead)))
            nodes.append(make_node("Squeeze", [node.output[0], axes], [rows], f"{rows}/squeeze"))
    _replace(graph.node, nodes)


def _drop(graph: onnx.GraphProto, makers: Collection[str], bound: Collection[str]) -> None:
    """Drops the makers and the weights that nothing reads any more when the values `bound` are inputs."""
    read = {v.name for v in graph.output}
    kept = []
    for node in reversed(graph.node):
        if node.output[0] in makers and read.isdisjoint(node.output):
            continue
        kept.append(node)
        read |= {use.node.input[use.place] for use in _uses([node])}.difference(bound)
    _replace(graph.node, kept[::-1])
    _replace(graph.initializer, [t for t in graph.initializer if t.name in read])


def _rename(nodes: Iterable[onnx.NodeProto], names: Mapping[str, str]) -> None:
    for use in _uses(nodes):
        name = use.node.input[use.place]
        use.node.input[use.place] = names.get(name, name)


def _signed(nodes: Repeated, name: str, binding: Binding) -> Binding:
    """The same bytes as int8; the nodes then add 256 to what is negative where they cast it."""
    if binding.dtype != "uint8":
        return binding
    _restore_bytes(nodes, name)
    sources = tuple(dataclasses.replace(s, dtype="int8") for s in binding.sources)
    return dataclasses.replace(binding, dtype="int8", sources=sources)


def _restore_bytes(nodes: Repeated, name: str) -> None:
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
    _replace(nodes, restored)


def _replace(field: Repeated, values: list[Any]) -> None:
    del field[:]
    field.extend(values)
