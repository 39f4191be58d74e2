"""A model of one node: an op of ours with its body, or an operator that others implement."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from llmexport.export.builder import ANOTHER_GRAPH, COMMAND
from llmexport.export.tensorrt_form import tensorrt_form
from llmexport.export.trace import trace_body
from llmexport.plugins import library
from llmexport.plugins.spec import DOMAIN, Attribute, all_ops

ELEMENTS = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
ELEMENTS |= {"int32": TensorProto.INT32}


def body_model(
    name: str,
    attributes: dict[str, Attribute],
    dtype: str,
    sizes: dict[str, int],
    without: int = 0,
    target: str = "portable",
) -> onnx.ModelProto:
    """The op and its body for these static sizes and this target; the last `without` optional inputs are left out."""
    op = all_ops()[name]
    inputs = dict(list(op.inputs.items())[: len(op.inputs) - without])
    types = {n: dtype if kind == "T" else kind for n, kind in op.types.items()}
    shapes = {n: [sizes.get(d, d) for d in dims] for n, dims in inputs.items()}
    body = trace_body(name, attributes, [types[n] for n in inputs], list(shapes.values()), target)
    given = {n: int(v) if isinstance(v, bool) else v for n, v in attributes.items()}
    node = helper.make_node(body.name, list(inputs), list(op.outputs), domain=DOMAIN, **given)
    values = {n: helper.make_tensor_value_info(n, ELEMENTS[types[n]], shapes.get(n)) for n in (*inputs, *op.outputs)}
    graph = helper.make_graph([node], "one", [values[n] for n in inputs], [values[n] for n in op.outputs])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1), *body.opset_import[1:]]
    return helper.make_model(graph, functions=[body], opset_imports=opsets, ir_version=10)


def model_of(
    nodes: list[onnx.NodeProto],
    inputs: list[str],
    outputs: list[str],
    opsets: list[onnx.OperatorSetIdProto] | None = None,
    functions: list[onnx.FunctionProto] | None = None,
) -> onnx.ModelProto:
    """Nodes on tensors of floats [batch, 4]."""
    values = {n: helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 4]) for n in inputs + outputs}
    graph = helper.make_graph(nodes, "g", [values[n] for n in inputs], [values[n] for n in outputs])
    opsets = opsets or [helper.make_opsetid("", 24), helper.make_opsetid("llmexport", 1)]
    return helper.make_model(graph, functions=functions or [], opset_imports=opsets, ir_version=10)


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def run_operator(
    name: str, domain: str, opset: int, inputs: list[np.ndarray | None], outputs: int, **attributes: Any
) -> list[np.ndarray]:
    """One operator, in ONNX Runtime if it is of a domain of its own, else in the onnx reference evaluator.

    An input that is None is left out.
    """
    feeds = {f"in_{i}": a for i, a in enumerate(inputs) if a is not None}
    names = [f"in_{i}" if a is not None else "" for i, a in enumerate(inputs)]
    results = [f"out_{i}" for i in range(outputs)]
    node = helper.make_node(name, names, results, domain=domain, **attributes)
    types = {n: helper.np_dtype_to_tensor_dtype(a.dtype) for n, a in feeds.items()}
    values = [helper.make_tensor_value_info(n, t, None) for n, t in types.items()]
    graph = helper.make_graph([node], "one", values, [helper.make_empty_tensor_value_info(n) for n in results])
    opsets = [helper.make_opsetid(d, v) for d, v in {"": 23, domain: opset}.items()]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return (session(model) if domain else ReferenceEvaluator(model)).run(None, feeds)


def rtx_build(model: onnx.ModelProto, dynamic: dict[str, tuple[int, int, int]], folder: Path) -> list[Any]:
    """The last thing that the builder of TensorRT-RTX says of the model, with its bodies in place of the ops:
    ["built"] if all is well. dynamic: the least, best and largest size of each dynamic dimension."""
    onnx.save(tensorrt_form(model)[0], folder / "model.onnx")
    dims = {i.name: i.type.tensor_type.shape.dim for i in model.graph.input}
    profile = {
        n: [[dynamic[d.dim_param][k] if d.dim_param else d.dim_value for d in ds] for k in range(3)]
        for n, ds in dims.items()
    }
    job = {"module": "tensorrt_rtx", "model": str(folder / "model.onnx"), "profile": profile}
    (folder / "job.json").write_text(json.dumps(job))
    pipe = subprocess.PIPE
    environment = library.builder_environment("tensorrt_rtx")
    with subprocess.Popen([*COMMAND, str(folder)], env=environment, stdin=pipe, stdout=pipe, text=True) as child:
        events = [json.loads(line) for line in child.stdout or ()]
    misread = [e for e in events if e[0] == "log" and ANOTHER_GRAPH.search(e[1])]
    return (misread or events)[-1]
