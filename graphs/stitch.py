"""Joins block graphs into one graph: every piece copied in, its values renamed, nothing recomputed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import GraphProto, ModelProto

from llmexport.plugins.spec import DOMAIN, VERSION


@dataclass(frozen=True)
class Piece:
    """A block graph at its place. `values` maps its inputs, parameters and outputs to the model's names."""

    name: str
    model: ModelProto
    values: Mapping[str, str]


def stitch(
    pieces: Sequence[Piece],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    *,
    opset: int,
) -> ModelProto:
    """One model of the pieces, which must stand in an order in which every value is made before it is used.

    Inputs of pieces that nothing makes and `inputs` does not name become further graph inputs, each once: the
    parameters, which a later step binds. Raises ValueError if two pieces make the same value, use one parameter
    with two shapes, or use a value before it is made.
    """
    graph = GraphProto(name="llmexport")
    made = {v.name for v in inputs}
    parameters: dict[str, onnx.ValueInfoProto] = {}
    typed: dict[str, onnx.ValueInfoProto] = {}
    for piece in pieces:
        _add(graph, piece, made, parameters, typed)
    graph.input.extend([*inputs, *parameters.values()])
    graph.output.extend(outputs)
    named = {v.name for v in outputs}
    graph.value_info.extend(v for v in typed.values() if v.name not in named)
    opsets = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid(DOMAIN, VERSION)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="llmexport")


def _add(
    graph: GraphProto,
    piece: Piece,
    made: set[str],
    parameters: dict[str, onnx.ValueInfoProto],
    typed: dict[str, onnx.ValueInfoProto],
) -> None:
    source = piece.model.graph
    names = dict(piece.values)

    def rename(name: str) -> str:
        return names.setdefault(name, f"{piece.name}/{name}") if name else ""

    for value in source.input:
        target = rename(value.name)
        if target in made:
            continue
        parameter = _renamed(value, target)
        if parameters.setdefault(target, parameter) != parameter:
            raise ValueError(f"{piece.name} uses {target} with another shape or type than a block before it")
    for tensor in source.initializer:
        graph.initializer.add().CopyFrom(tensor)
        graph.initializer[-1].name = rename(tensor.name)
    for node in source.node:
        copy = graph.node.add()
        copy.CopyFrom(node)
        copy.name = f"{piece.name}/{node.name.removeprefix('node_')}"
        copy.input[:] = [rename(n) for n in node.input]
        copy.output[:] = [rename(n) for n in node.output]
        twice = made.intersection(copy.output)
        if twice:
            raise ValueError(f"{piece.name} makes {', '.join(twice)}, which a block before it made")
        late = parameters.keys() & set(copy.output)
        if late:
            raise ValueError(f"{piece.name} makes {', '.join(late)}, which a block before it has used")
        made.update(copy.output)
    for value in (*source.value_info, *source.output):
        typed[rename(value.name)] = _renamed(value, rename(value.name))


def _renamed(value: onnx.ValueInfoProto, name: str) -> onnx.ValueInfoProto:
    copy = onnx.ValueInfoProto()
    copy.CopyFrom(value)
    copy.name = name
    return copy
