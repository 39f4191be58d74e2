"""Models of one op and its function body, made of tensors."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info
from torch import Tensor

from llmexport.export.trace import trace_body
from llmexport.plugins.spec import DOMAIN, Op, all_ops

ELEMENTS = {torch.float32: 1, torch.uint8: 2, torch.int32: 6, torch.float16: 10, torch.bfloat16: 16}
NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in ELEMENTS}
DYNAMIC = {"B": (1, 2, 2), "T": (1, 7, 130)}


def node_model(
    name: str,
    attributes: dict[str, Any],
    tensors: dict[str, Tensor],
    stored: Collection[str] = (),
    target: str = "portable",
) -> onnx.ModelProto:
    """One node on inputs of these types, all dimensions but the op's static ones dynamic; those `stored` are
    initialisers, the others graph inputs. `tensors` are in the op's order and lack optional inputs at the end. The body
    is that of `target`."""
    op = all_ops()[name]
    dims = {n: _dims(op, n, t) for n, t in tensors.items()}
    body = trace_body(name, attributes, [NAMES[t.dtype] for t in tensors.values()], list(dims.values()), target)
    integers = {n: int(v) if isinstance(v, bool) else v for n, v in attributes.items()}
    node = make_node(body.name, list(tensors), list(op.outputs), "node", domain=DOMAIN, **integers)
    inputs = [make_tensor_value_info(n, ELEMENTS[t.dtype], dims[n]) for n, t in tensors.items() if n not in stored]
    values = dict.fromkeys(op.inputs) | {n: t.to("meta") for n, t in tensors.items()}
    found = op(**values, **attributes)
    found = found if isinstance(found, tuple) else (found,)
    outputs = [
        make_tensor_value_info(n, ELEMENTS[t.dtype], [f"{n}_{i}" for i in range(t.ndim)])
        for n, t in zip(op.outputs, found, strict=True)
    ]
    graph = make_graph([node], "one", inputs, outputs, [_initializer(n, tensors[n]) for n in stored])
    opsets = [make_opsetid("", 23), make_opsetid(DOMAIN, 1), *body.opset_import[1:]]
    model = make_model(graph, functions=[body], opset_imports=opsets, ir_version=10)
    if torch.bfloat16 not in {t.dtype for t in tensors.values()}:
        # Of bf16 the checker knows less than the runtimes.
        onnx.checker.check_model(model, full_check=True)
    return model


def run(found: onnxruntime.InferenceSession, tensors: dict[str, Tensor]) -> list[np.ndarray]:
    """What ONNX Runtime gives for the tensors that are graph inputs."""
    return found.run(None, {i.name: tensors[i.name].numpy() for i in found.get_inputs()})


def _dims(op: Op, name: str, tensor: Tensor) -> list[int | str]:
    sizes = zip(op.inputs[name], tensor.shape, strict=True)
    return [n if d in op.static or d not in DYNAMIC else d for d, n in sizes]


def _initializer(name: str, tensor: Tensor) -> onnx.TensorProto:
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return onnx.helper.make_tensor(name, ELEMENTS[tensor.dtype], tensor.shape, data, raw=True)
