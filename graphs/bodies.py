"""Function bodies of our ops, so that a runtime without our plugins can run a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import onnx

from llmexport.plugins.declared import declared
from llmexport.plugins.dtypes import BY_ONNX
from llmexport.plugins.spec import DOMAIN, Attribute, op_name

PLUGIN_VERSION = "plugin_version"  # what TensorRT's parser takes for "1" where a node does not say it
# (op, attributes, types and shapes of the node's inputs) -> body
Body = Callable[[str, dict[str, Attribute], list[str], list[list[int | str]]], onnx.FunctionProto]


def attach_bodies(model: onnx.ModelProto, body: Body) -> dict[str, int]:
    """Adds the body of every llmexport op to `model`, in place, and returns how often each op occurs.

    A body belongs to one set of attribute values, and many tools tell functions apart by name alone: each body has
    a name of its own, which its nodes take as their type. `op_of` gives the op again. Raises ValueError if the type
    or rank of an op's input is not in the graph.
    """
    graph = model.graph
    version = next(o.version for o in model.opset_import if not o.domain)
    graphs = [*graphs_of(graph)]
    typed = {v.name: v.type.tensor_type for g in graphs for v in (*g.input, *g.output, *g.value_info)}
    typed |= {t.name: onnx.helper.make_tensor_type_proto(t.data_type, t.dims).tensor_type for t in graph.initializer}
    bodies: dict[str, onnx.FunctionProto] = {}
    known: dict[str, str] = {}  # all that a body depends on -> the body's name
    for node in (n for g in graphs for n in g.node):
        if node.domain != DOMAIN:
            continue
        untyped = [n for n in node.input if n not in typed or not typed[n].HasField("shape")]
        if untyped:
            raise ValueError(f"{node.name}: type or rank of {', '.join(untyped)} is not known")
        for said in [a for a in node.attribute if a.name == PLUGIN_VERSION]:
            node.attribute.remove(said)
        shapes = [[d.dim_param or d.dim_value for d in typed[n].shape.dim] for n in node.input]
        types = [BY_ONNX[typed[n].elem_type].name for n in node.input]
        wanted = (node.op_type, _attributes(node), types, shapes)
        if repr(wanted) not in known:
            made = body(*wanted)
            # Later versions of ai.onnx add operators and types, and change none that bodies are made of.
            made.opset_import[0].version = version
            known[repr(wanted)] = made.name
            if bodies.setdefault(made.name, made) != made:
                raise ValueError(f"{node.name}: two bodies are called {made.name}")
        node.op_type = known[repr(wanted)]
    model.functions.extend(bodies.values())
    known_domains = {o.domain for o in model.opset_import}
    for domain in sorted({o.domain for f in bodies.values() for o in f.opset_import} - known_domains):
        model.opset_import.add(domain=domain, version=1)
    return count(model)


def leave_to_plugins(model: onnx.ModelProto, served: frozenset[str] | None = None) -> None:
    """Has TensorRT's parser find the plugins of the ops in `served`, or of all of ours, by their names and versions."""
    later = {op.name: str(op.version) for op in declared() if op.version > 1}
    for node in (n for g in graphs_of(model.graph) for n in g.node if n.domain == DOMAIN):
        op = op_of(node)
        if served is not None and op not in served:
            continue
        node.op_type = op
        if op in later and PLUGIN_VERSION not in {a.name for a in node.attribute}:
            node.attribute.append(onnx.helper.make_attribute(PLUGIN_VERSION, later[op]))


def count(model: onnx.ModelProto) -> dict[str, int]:
    """How often each of our ops occurs, in order of first use."""
    return dict(Counter(op_of(n) for g in graphs_of(model.graph) for n in g.node if n.domain == DOMAIN))


def graphs_of(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph, and those within its nodes."""
    yield graph
    for attribute in (a for node in graph.node for a in node.attribute if a.HasField("g")):
        yield from graphs_of(attribute.g)


def op_of(node: onnx.NodeProto) -> str:
    """The op of one of our nodes, whether its body is attached or not."""
    return op_name(node.op_type)


def _attributes(node: onnx.NodeProto) -> dict[str, Attribute]:
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return {n: v.decode() if isinstance(v, bytes) else v for n, v in values.items()}
