"""Cleans a graph that torch's exporter has just made."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from onnx.helper import get_attribute_value, make_attribute

from llmexport.export.spec import AXES, FEATURES, SEQUENCE, Port, axis_of, behind, patch_axis

# The other forms that a Constant's numbers may have.
CONSTANTS = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32}


def tidy(model: onnx.ModelProto) -> onnx.ModelProto:
    """Drops what the exporter leaves behind: unused optional outputs, its metadata, its names for sums of dims."""
    graph = model.graph
    used = {name for node in graph.node for name in node.input} | {o.name for o in graph.output}
    for node in graph.node:
        while len(node.output) > 1 and node.output[-1] not in used:
            del node.output[-1]
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    del graph.metadata_props[:]
    del model.metadata_props[:]
    made = {name for node in graph.node for name in node.output}
    typed = [v for v in graph.value_info if v.name in made]
    del graph.value_info[:]
    graph.value_info.extend(typed)
    sums = {frozenset(a.sum_of): a.name for a in AXES.values() if a.sum_of}
    for value in (*graph.input, *graph.output, *graph.value_info):
        value.ClearField("metadata_props")
        for dim in value.type.tensor_type.shape.dim:
            terms = frozenset(dim.dim_param.split(" + "))
            more = [t for t in terms - {SEQUENCE} if t.isdecimal()]
            if terms in sums:
                dim.dim_param = sums[terms]
            elif more and terms == {SEQUENCE, *more}:
                dim.dim_param = behind(int(more[0]))
            elif dim.dim_param.endswith(f"*{FEATURES}"):
                dim.dim_param = patch_axis(int(dim.dim_param.removesuffix(f"*{FEATURES}")))
    _settle_reshapes(graph)
    return model


def name_sizes(graph: onnx.GraphProto, outputs: Iterable[Port]) -> None:
    """Gives sizes of outputs that the exporter has names of its own for, as `9*tiles`, those of the ports."""
    names: dict[str, str] = {}
    for value, port in zip(graph.output, outputs, strict=True):
        for dim, named in zip(value.type.tensor_type.shape.dim, port.shape, strict=True):
            made = dim.dim_param
            if made and isinstance(named, str) and made not in AXES and not axis_of(made).sum_of:
                names[made] = named
    for value in (*graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]


def constant(tensor: onnx.TensorProto) -> onnx.NodeProto:
    return onnx.helper.make_node("Constant", [], [tensor.name], value=tensor)


def hold_tensors(nodes: Iterable[onnx.NodeProto]) -> None:
    """Makes every Constant, of branches and loops too, hold its numbers as a tensor, in place.

    ONNX Runtime before 1.25 loses the shape of a list that stands in a function, and TopK asks for it.
    """
    for node in nodes:
        for attribute in node.attribute:
            hold_tensors(attribute.g.node)
        if node.op_type == "Constant" and node.attribute[0].name in CONSTANTS:
            value = np.array(get_attribute_value(node.attribute[0]), CONSTANTS[node.attribute[0].name])
            node.attribute[0].CopyFrom(make_attribute("value", onnx.numpy_helper.from_array(value)))


def _settle_reshapes(graph: onnx.GraphProto) -> None:
    """Gives reshapes that keep their leading dynamic dimensions a constant shape, [0, 0, heads, size] and such."""
    shapes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*graph.input, *graph.output, *graph.value_info)
    }
    for node in graph.node:
        old, new = shapes.get(node.input[0]) if node.input else None, shapes.get(node.output[0])
        if node.op_type != "Reshape" or not old or not new:
            continue
        kept = [d if isinstance(d, int) else 0 for d in new]
        dynamic = [i for i, d in enumerate(new) if isinstance(d, str)]
        if all(i < len(old) and old[i] == new[i] for i in dynamic) and 0 not in new:
            node.input[1] = f"{node.output[0]}_shape"
            graph.initializer.append(onnx.numpy_helper.from_array(np.array(kept, np.int64), node.input[1]))
            del node.attribute[:]
    _drop_dead(graph)


def _drop_dead(graph: onnx.GraphProto) -> None:
    live = {o.name for o in graph.output}
    for node in reversed(list(graph.node)):
        if live.isdisjoint(node.output):
            graph.node.remove(node)
        else:
            live.update(node.input)
    for dead in [t for t in graph.initializer if t.name not in live]:
        graph.initializer.remove(dead)
    for value in [v for v in graph.value_info if v.name not in live]:
        graph.value_info.remove(value)
