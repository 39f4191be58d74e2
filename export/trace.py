"""Traces a block or an op's reference to an ONNX graph. The only file that calls torch.onnx.

Parameters become graph inputs, so that a trace holds no weights, equal blocks share one trace, and no optimiser
can merge two weights that happen to be equal.
"""

from __future__ import annotations

import functools
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx
import onnxscript
import onnxscript.optimizer
import torch
from torch import Tensor, nn

from llmexport.export import blocks
from llmexport.export.blocks import standard
from llmexport.export.shortcuts import shortcuts
from llmexport.export.spec import AXES, OPSET, Block, Port, axis_of, size_of, with_sums
from llmexport.export.tidy import constant, hold_tensors, name_sizes, tidy
from llmexport.plugins.spec import DOMAIN, VERSION, Attribute, Op, all_ops

# Sizes to trace at: distinct, so that no two dimensions are taken for one, and above 1, which would be special.
PRIMES = (2, 5, 3, 7, 11, 13, 17, 19, 23, 29, 31)
SIZES = with_sums(dict(zip((a.name for a in AXES.values() if not a.sum_of), PRIMES, strict=False)))


def trace_block(block: Block, dtype: str) -> onnx.ModelProto:
    """The graph of one block: its input ports, then its parameters, in; its output ports out.

    Parameters are named by their path in the block's module. No function bodies, no initialisers but small
    constants; dynamic dimensions carry the names of the ports.
    """
    module = blocks.module(block, torch_dtype(dtype))
    buffers = dict(module.named_buffers())
    state = dict(module.named_parameters()) | {n: b.to("meta") for n, b in buffers.items()}
    ports = len(block.inputs)

    def forward(*tensors: Tensor) -> Any:
        return torch.func.functional_call(module, dict(zip(state, tensors[ports:], strict=True)), tensors[:ports])

    examples = [_example(p, dtype) for p in block.inputs]
    names = [p.name for p in block.inputs] + list(state)
    dims = [p.shape for p in block.inputs] + [() for _ in state]
    outputs = [p.name for p in block.outputs]
    model = _export(forward, [*examples, *state.values()], names, dims, outputs, block.opset)
    name_sizes(model.graph, block.outputs)
    constants = [i for i in model.graph.input if i.name in buffers]
    for value in constants:
        model.graph.input.remove(value)
        model.graph.initializer.append(onnx.numpy_helper.from_array(buffers[value.name].numpy(), value.name))
    return model


def trace_body(
    name: str,
    attributes: dict[str, Attribute],
    types: list[str],
    shapes: list[list[int | str]],
    target: str = "portable",
) -> onnx.FunctionProto:
    """The ONNX function body of an op, for one set of attribute values: the one it brings, or its reference, traced.

    `types` and `shapes` are those of a node's inputs, which may lack optional ones; the op's static dimensions are
    fixed to them, the others stay dynamic. Its name says what the body is for.
    """
    op = all_ops()[name]
    attributes = {n: op.attributes[n](v) for n, v in attributes.items()}
    inputs = dict(list(op.inputs.items())[: len(types)])
    pairs = zip(inputs.values(), shapes, strict=True)
    seen = {d: n for dims, shape in pairs for d, n in zip(dims, shape, strict=True)}
    sizes = {d: int(seen[d]) for d in op.static if d in seen}
    write = op.bodies.get(target, op.body)
    text = write(attributes, dict(zip(inputs, types, strict=True)), sizes) if write else None
    if text is not None:
        nodes = _parse(text, list(inputs), list(op.outputs))
    else:
        nodes = _trace_reference(op, attributes, inputs, types, sizes)
    hold_tensors(nodes)
    return onnx.helper.make_function(
        DOMAIN,
        op.body_name(attributes, types, sizes),
        list(inputs),
        list(op.outputs),
        nodes,
        [onnx.helper.make_opsetid(d, 1 if d else OPSET) for d in sorted({"", *(n.domain for n in nodes)})],
        sorted(attributes),
    )


def _parse(text: str, inputs: list[str], outputs: list[str]) -> list[onnx.NodeProto]:
    """The nodes of a body in ONNX's textual form."""
    head = f'<opset_import: ["" : {OPSET}], domain: "{DOMAIN}"> body ({", ".join(inputs)}) => ({", ".join(outputs)})'
    return list(onnx.parser.parse_function(f"{head} {{\n{text}\n}}").node)


def _trace_reference(
    op: Op, attributes: dict[str, Any], inputs: dict[str, tuple[str, ...]], types: list[str], sizes: dict[str, int]
) -> list[onnx.NodeProto]:
    dims = [[sizes.get(d, d) for d in dims] for dims in inputs.values()]
    dynamic = sorted({d for shape in dims for d in shape if isinstance(d, str)})
    examples = [
        torch.empty([5 + dynamic.index(d) if isinstance(d, str) else d for d in shape], dtype=t, device="meta")
        for shape, t in zip(dims, map(torch_dtype, types), strict=True)
    ]
    absent = dict.fromkeys(list(op.inputs)[len(inputs) :])

    def forward(*tensors: Tensor) -> Any:
        return op.reference(**dict(zip(inputs, tensors, strict=True)), **absent, **attributes)

    model = _export(forward, examples, list(inputs), dims, list(op.outputs))
    return [*(constant(t) for t in model.graph.initializer), *model.graph.node]


def module_shapes(block: Block) -> dict[str, tuple[int, ...]]:
    """The parameters of a block: path in its module -> shape."""
    return {n: tuple(p.shape) for n, p in blocks.module(block, torch.float32).named_parameters()}


def torch_dtype(dtype: str) -> torch.dtype:
    """The torch dtype of this name, as "float32"."""
    found = getattr(torch, dtype)
    assert isinstance(found, torch.dtype)
    return found


def _example(port: Port, dtype: str) -> Tensor:
    sizes = [size_of(d, SIZES) for d in port.shape]
    return torch.empty(sizes, dtype=torch_dtype(port.typed(dtype).dtype), device="meta")


def _export(
    forward: Callable[..., Any],
    examples: Sequence[Tensor],
    names: list[str],
    dims: Sequence[Sequence[int | str]],
    outputs: list[str],
    opset: int = OPSET,
) -> onnx.ModelProto:
    """`forward` as an ONNX model; string dims are dynamic, equal names are equal dimensions."""

    class Traced(nn.Module):
        def forward(self, tensors: list[Tensor]) -> Any:
            return forward(*tensors)

    axes = [axis_of(d) for shape in dims for d in shape if isinstance(d, str)]
    # One that is so many times another divides by that.
    symbols = {a.name: a.times * torch.export.Dim(*a.sum_of) if a.times > 1 else torch.export.Dim(a.name) for a in axes}
    dynamic = [{i: symbols[d] for i, d in enumerate(shape) if isinstance(d, str)} for shape in dims]
    arguments: dict[str, Any] = {
        "input_names": names,
        "output_names": outputs,
        "dynamic_shapes": (dynamic,),
        "opset_version": opset,
        "dynamo": True,
        "optimize": False,
        "verbose": False,
        "custom_translation_table": _translations(),
    }
    with _quiet():
        try:
            with shortcuts():
                program = torch.onnx.export(Traced().eval(), (list(examples),), **arguments)
        except torch.onnx.OnnxExporterError:
            # An operator that is only translated once it is decomposed.
            program = torch.onnx.export(Traced().eval(), (list(examples),), **arguments)
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    with shortcuts():
        # Folds constants only: the exporter's own optimiser also rewrites norms into operators of mixed types.
        onnxscript.optimizer.optimize_ir(program.model)
    return tidy(program.model_proto)


@functools.cache
def _translations() -> dict[Any, Callable[..., Any]]:
    """What the exporter emits for our ops: one node each."""
    opset = onnxscript.values.Opset(DOMAIN, VERSION)
    table = dict(standard.translations())
    for op in all_ops().values():
        onnx.defs.register_schema(op.schema)
        table[getattr(torch.ops.llmexport, op.torch_name).default] = _translation(op, opset)
    return table


def _translation(op: Op, opset: onnxscript.values.Opset) -> Callable[..., Any]:
    """A function with the op's own signature, which the exporter reads, that emits the op's node."""

    def translate(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs).arguments
        attributes = {n: int(v) if isinstance(v, bool) else v for n, v in bound.items() if n in op.attributes}
        return getattr(opset, op.name)(*(v for n in op.inputs if (v := bound.get(n)) is not None), **attributes)

    signature = inspect.signature(op.reference)
    translate.__signature__ = signature  # type: ignore[attr-defined]
    translate.__name__ = op.name
    return translate


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of things that are meant: shared symbols, absent torchvision."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
