"""The scores of the last token alone: nobody who goes on from a prompt of T tokens wants T rows of the vocabulary."""

from __future__ import annotations

import dataclasses

import onnx
from onnx.helper import make_node, make_tensor

from llmexport.export.errors import ExportError
from llmexport.export.exported import ExportedGraph
from llmexport.export.graph_file import value_info
from llmexport.export.spec import SEQUENCE, Head, Model
from llmexport.graphs.cut import cut

INDEX = "last_logits/index"


def with_last_logits(model: Model) -> Model:
    """The model whose head reads the last token of each row alone. Raises ExportError if it is no decoder."""
    graphs = []
    for graph in model.graphs:
        heads = {s: dataclasses.replace(s.block, last=True) for s in graph.assembly.steps if isinstance(s.block, Head)}
        if heads and not graph.carried:
            raise ExportError("an encoder's logits are of all tokens, it has no last one: leave --logits last out")
        rows = {n: p.shape for s, b in heads.items() for n, p in zip(s.outputs, b.outputs, strict=True)}
        steps = tuple(dataclasses.replace(s, block=heads.get(s, s.block)) for s in graph.assembly.steps)
        outputs = tuple(dataclasses.replace(p, shape=rows.get(p.name, p.shape)) for p in graph.assembly.outputs)
        assembly = dataclasses.replace(graph.assembly, steps=steps, outputs=outputs)
        graphs.append(dataclasses.replace(graph, assembly=assembly))
    return dataclasses.replace(model, graphs=tuple(graphs))


def last_logits(model: onnx.ModelProto, graph: ExportedGraph, dtype: str) -> onnx.ModelProto:
    """The same graph, whose logits are those of the last token of each row [B, 1, V]; as it is where they are already.

    model: as graph_file.load gives it. The last token is no padding as long as that stands on the left. What the head
    reads is cut to one row before it is read, so that the projection sees one row:

        hidden -> norm -> MatMul -> logits      hidden -> Gather(-1) -> norm -> MatMul -> logits

    Where the norm is fused with the sum that makes `hidden`, its own result is cut instead.
    """
    logits = [p.name for p in graph.assembly.outputs if p.use == "logits" and SEQUENCE in p.shape]
    if not logits:
        return model
    [head] = [s for s in graph.assembly.steps if logits[0] in s.outputs]
    reads = {n: p for n, p in zip(head.inputs, head.block.inputs, strict=True) if SEQUENCE in p.shape}
    axes = {n: p.shape.index(SEQUENCE) for n, p in reads.items()}
    part = cut(model, [value_info(dataclasses.replace(p, name=n), dtype) for n, p in reads.items()], logits)
    names = {n.output[0] for n in part.graph.node}
    inside = [n for n in model.graph.node if n.output[0] in names and not axes.keys() & {*n.output}]
    for fused in [n for n in model.graph.node if n.output[0] in names and axes.keys() & {*n.output}]:
        axes[fused.output[0]] = next(axes[n] for n in fused.output if n in axes)
    read = {n for node in inside for n in node.input}
    last = {
        n: make_node("Gather", [n, INDEX], [f"{n}/last"], f"{n}/last", axis=a) for n, a in axes.items() if n in read
    }

    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    del changed.graph.node[:]
    changed.graph.initializer.append(make_tensor(INDEX, onnx.TensorProto.INT64, [1], [-1]))
    changed.graph.node.extend(last[v.name] for v in model.graph.input if v.name in last)
    within = {n.output[0] for n in inside}
    for node in model.graph.node:
        copy = changed.graph.node.add()
        copy.CopyFrom(node)
        if node.output[0] in within:
            copy.input[:] = [last[n].output[0] if n in last else n for n in node.input]
        changed.graph.node.extend(last[n] for n in node.output if n in last)
    made = {n for node in inside for n in node.output}
    for value in (*changed.graph.value_info, *changed.graph.output):
        for dim in value.type.tensor_type.shape.dim if value.name in made else ():
            if dim.dim_param == SEQUENCE:
                dim.dim_value = 1
    return changed
