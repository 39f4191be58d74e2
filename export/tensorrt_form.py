"""A model as TensorRT reads it: bodies inlined, ops of ours left to plugins, what it would misread refused."""

from __future__ import annotations

import onnx
import onnx.inliner
import onnx.parser
from onnx.helper import get_attribute_value, make_node

from llmexport.export.errors import EngineError
from llmexport.graphs import pipeline
from llmexport.graphs.bodies import leave_to_plugins, op_of
from llmexport.plugins.declared import declared
from llmexport.plugins.spec import DOMAIN, VERSION, op_name

# All that TensorRT reads of Attention as ONNX means it.
ATTENTION = ("scale", "q_num_heads", "kv_num_heads")
# The heads that read one k and v beside each other: [B, groups, heads, T, D]. A row without a true mask is the mean
# of v, as in transformers' eager attention, and not NaN, since a padding token's values go into the next layer's v.
PRIMITIVES = onnx.parser.parse_function(
    """<domain: "primitives", opset_import: ["" : 23]>
    Attention <scale, grouped, merged> (q, k, v, mask) => (y) {
        to_groups = Constant <value_ints: ints = @grouped> ()
        to_heads = Constant <value_ints: ints = @merged> ()
        factor = Constant <value_float: float = @scale> ()
        lowest = Constant <value_float: float = -3.4028234663852886e38> ()
        two = Constant <value_ints: ints = [2]> ()
        q_grouped = Reshape (q, to_groups)
        k_grouped = Unsqueeze (k, two)
        k_columns = Transpose <perm = [0, 1, 2, 4, 3]> (k_grouped)
        products = MatMul (q_grouped, k_columns)
        scores = Mul (products, factor)
        allowed = Unsqueeze (mask, two)
        masked = Where (allowed, scores, lowest)
        p = Softmax <axis = -1> (masked)
        v_grouped = Unsqueeze (v, two)
        y_grouped = MatMul (p, v_grouped)
        y = Reshape (y_grouped, to_heads)
    }"""
)


def tensorrt_form(
    model: onnx.ModelProto, served: frozenset[str] = frozenset()
) -> tuple[onnx.ModelProto, dict[str, str]]:
    """The model with the ops in `served` left to plugins and all other functions inlined; and the nodes that are
    left to plugins, name -> op. Raises EngineError on what TensorRT would misread, and on ops of an earlier version.

    It finds an op by type alone: nodes that are left to plugins take their op's name again. It gives plugins no uint8
    (NvInferRuntimePlugin.h) and makes int32 of uint8 constants: weights that only plugins read become int8, byte for
    byte. It has no fused kernel for attention in float32 but decomposes it, for which RTX 1.7.1 takes all memory
    beside a Loop: it is decomposed here.
    """
    rest = onnx.ModelProto()
    rest.CopyFrom(model)
    del rest.functions[:]
    rest.functions.extend(f for f in model.functions if op_name(f.name) not in served)
    _check_versions(model, served)
    leave_to_plugins(rest, served)
    rest = _fused(rest, served)
    _decompose_attention(rest)
    inlined = onnx.inliner.inline_local_functions(rest)
    for node in inlined.graph.node:
        if node.domain and not (node.domain == DOMAIN and node.op_type in served):
            raise EngineError(f"{node.name}: {node.domain}::{node.op_type} has no body to build it from")
        if misread := _misread(node):
            raise EngineError(f"{node.name}: TensorRT misreads or ignores {', '.join(misread)} of Attention")
    plugin_nodes = [n for n in inlined.graph.node if n.domain == DOMAIN]
    read_elsewhere = {name for n in inlined.graph.node if n.domain != DOMAIN for name in n.input}
    bytes_of_plugins = {name for n in plugin_nodes for name in n.input} - read_elsewhere
    for weight in inlined.graph.initializer:
        if weight.name in bytes_of_plugins and weight.data_type == onnx.TensorProto.UINT8:
            weight.data_type = onnx.TensorProto.INT8
    return inlined, {n.name: n.op_type for n in plugin_nodes}


def _fused(model: onnx.ModelProto, served: frozenset[str]) -> onnx.ModelProto:
    """The model with ops of ours in place of what an export for no target leaves apart, where they have plugins."""
    if served.isdisjoint(pipeline.OF_ENGINES):
        return model
    functions = list(model.functions)
    del model.functions[:]
    made = pipeline.run_for_engine(model, served)
    made.functions.extend(functions)
    del made.opset_import[:]
    made.opset_import.extend(model.opset_import)
    return made


def _check_versions(model: onnx.ModelProto, served: frozenset[str]) -> None:
    """Raises EngineError if a plugin would compute another version of an op than a graph of ours has."""
    imported = next((o.version for o in model.opset_import if o.domain == DOMAIN), VERSION)
    changed = {o.name: o.version for o in declared() if o.name in served and o.version > imported}
    for node in model.graph.node:
        if node.domain == DOMAIN and (version := changed.get(op_of(node))):
            raise EngineError(
                f"{node.name} is {op_of(node)} of version {imported} or earlier, its plugin of version {version}: "
                "export the model again"
            )


def _misread(node: onnx.NodeProto) -> list[str]:
    """What TensorRT reads of an Attention in another way than ONNX means it: attributes and inputs."""
    if node.op_type != "Attention":
        return []
    said = {a.name: get_attribute_value(a) for a in node.attribute}
    return [n for n, v in said.items() if v and n not in ATTENTION] + [n for n in node.input[4:] if n]


def _decompose_attention(model: onnx.ModelProto) -> None:
    """Calls PRIMITIVES for each Attention of float32 with q, k, v of [B, heads, T, D] and a mask of true and false."""
    graph = model.graph
    typed = {v.name: v.type.tensor_type for v in (*graph.input, *graph.output, *graph.value_info)}
    attentions = [
        n
        for n in graph.node
        if n.op_type == "Attention"
        and len(n.input) == 4
        and all(i in typed and len(typed[i].shape.dim) == 4 for i in n.input)
        and typed[n.input[0]].elem_type == onnx.TensorProto.FLOAT
        and typed[n.input[3]].elem_type == onnx.TensorProto.BOOL
        and all(typed[i].shape.dim[1].dim_value for i in n.input)
        and typed[n.input[3]].shape.dim[1].dim_value == 1
        and not _misread(n)
    ]
    for node in attentions:
        q, k, v = ([d.dim_value for d in typed[i].shape.dim] for i in node.input[:3])
        call = make_node(
            *("Attention", node.input, node.output, node.name, None, PRIMITIVES.domain),
            scale=next((get_attribute_value(a) for a in node.attribute if a.name == "scale"), q[3] ** -0.5),
            grouped=[0, k[1], q[1] // k[1], -1, q[3]],
            merged=[0, q[1], -1, v[3]],
        )
        node.CopyFrom(call)
    if attentions:
        # The inliner takes functions of the model's own version alone.
        ours = next(o for o in model.opset_import if not o.domain)
        model.functions.append(PRIMITIVES)
        model.functions[-1].opset_import[0].version = ours.version
        model.opset_import.append(onnx.helper.make_opsetid(PRIMITIVES.domain, 1))
