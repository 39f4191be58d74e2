"""One row of scores: the last of all, made by a head that sees one token."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from arch_cases import DECODERS, FIRST, Case, others_slow

from llmexport.export import manifest
from llmexport.export.exported import Export, ExportedGraph
from llmexport.export.graph_file import load
from llmexport.export.last_logits import last_logits
from llmexport.export.spec import BATCH, SEQUENCE
from llmexport.validate.compare import compare
from llmexport.validate.feeds import draw, shape_of, states
from llmexport.validate.runtime import open_session
from llmexport.validate.tolerance import tolerance

SIZES = {"batch": 2, "sequence": 13, "past": 0, "total": 13}


def ran(export: Export, graph: ExportedGraph, model: onnx.ModelProto) -> dict[str, np.ndarray]:
    ports = [p for p in graph.assembly.inputs if p.name not in graph.carried]
    feed = draw(ports, export.blocks, export.dtype, SIZES) | states(graph, export.dtype, SIZES)
    names = [p.name for p in graph.assembly.outputs]
    return dict(zip(names, open_session(model, export.folder).run(names, feed), strict=True))


def inferred(model: onnx.ModelProto) -> dict[str, list[int | str]]:
    """The shape of every value."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    typed = (*graph.value_info, *graph.input, *graph.output)
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in typed}


@pytest.mark.parametrize("case", others_slow(DECODERS, [c for c in FIRST if c in DECODERS]), ids=str)
def test_the_last_row_is_the_same_and_the_states_are(case: Case, exported) -> None:
    export = manifest.read(exported(case))
    [graph] = export.graphs
    model = load(export, graph)
    whole, last = ran(export, graph, model), ran(export, graph, last_logits(model, graph, "float32"))
    [logits] = [p for p in graph.assembly.outputs if p.use == "logits"]
    assert last[logits.name].shape == (2, 1, *shape_of(logits, SIZES)[2:])
    # ONNX Runtime may take another kernel for a product of one row: bits are those of the kernel.
    difference = compare(whole.pop(logits.name)[:, -1:], last.pop(logits.name))
    assert difference.excess(tolerance("float32", export)) <= 1
    for name, states_of_all in whole.items():
        assert np.array_equal(last[name], states_of_all), name


@pytest.mark.parametrize("case", others_slow(DECODERS, [c for c in FIRST if c in DECODERS]), ids=str)
def test_the_projection_sees_one_token(case: Case, exported) -> None:
    """What follows the cut has one row, as shapes are inferred, and the logits follow it."""
    export = manifest.read(exported(case))
    [graph] = export.graphs
    model = load(export, graph)
    changed = last_logits(model, graph, "float32")
    shapes = inferred(changed)
    [cut] = [n for n in changed.graph.node if n.output[0].endswith("/last")]
    after, products = set(cut.output), 0
    for node in changed.graph.node:
        if after & {*node.input}:
            after |= {*node.output}
            products += node.op_type in ("MatMul", "Gemm")
    [logits] = [p for p in graph.assembly.outputs if p.use == "logits"]
    assert shapes[logits.name] == [BATCH, 1, logits.shape[-1]]
    assert logits.name in after
    assert products == 1
    assert [n for n in after if SEQUENCE in shapes[n]] == []
    assert len(changed.graph.node) == len(model.graph.node) + 1
