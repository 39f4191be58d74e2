"""One row of scores: the last of all, made by a head that sees one token."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from arch_cases import DECODERS, FIRST, Case, others_slow

from llmexport.export import archs, blocks, manifest, onnx_file, spec
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.errors import ExportError
from llmexport.export.exported import Export, ExportedGraph
from llmexport.export.graph_file import load
from llmexport.export.last_logits import last_logits
from llmexport.export.spec import BATCH, SEQUENCE, Head
from llmexport.validate.compare import compare
from llmexport.validate.feeds import draw, shape_of, states
from llmexport.validate.ladder import climb
from llmexport.validate.runtime import open_session
from llmexport.validate.tolerance import TOLERANCE, tolerance

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
    [head] = [b for b in export.blocks if isinstance(b, Head)]
    assert products == 1 + bool(head.inner)
    assert [n for n in after if SEQUENCE in shapes[n]] == []
    assert len(changed.graph.node) == len(model.graph.node) + 1


def export_last(checkpoint: Path, folder: Path) -> Export:
    named = archs.choose(None, open_checkpoint(checkpoint).config)
    return onnx_file.write(onnx_file.Request(named, open_checkpoint(checkpoint), logits="last"), folder)


@pytest.mark.parametrize("arch", others_slow(["cohere", "gpt_oss", "llama"], ["llama"]))
def test_an_export_of_the_last_logits_passes_every_rung(arch: str, tiny_checkpoint, tmp_path: Path) -> None:
    export = export_last(tiny_checkpoint(arch), tmp_path / "last")
    [logits] = [p for p in export.graphs[0].assembly.outputs if p.use == "logits"]
    assert logits.shape[:2] == (BATCH, 1)
    assert json.loads((tmp_path / "last/manifest.json").read_text())["logits"] == "last"
    report = climb(manifest.read(tmp_path / "last"), rungs=["transformers", "blocks", "onnxruntime", "network"])
    assert [(r.name, r.status) for r in report.rungs if r.status != "pass"] == []
    assert len(report.rungs) == 4


def test_nothing_is_cut_twice(tiny_checkpoint, tmp_path: Path) -> None:
    export = export_last(tiny_checkpoint("llama"), tmp_path / "last")
    [graph] = export.graphs
    model = load(export, graph)
    assert last_logits(model, graph, "float32") is model


def test_an_encoder_has_no_last_token(tiny_checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="an encoder's logits are of all tokens"):
        export_last(tiny_checkpoint("bert"), tmp_path / "last")


def test_logits_are_all_unless_asked(exported) -> None:
    assert json.loads((exported("llama") / "manifest.json").read_text())["logits"] == "all"
    assert not manifest.read(exported("llama")).gives_last_logits


@pytest.mark.parametrize("tokens", [1, 2, 63])
def test_the_head_gives_the_row_of_the_last_token(tokens: int) -> None:
    torch.manual_seed(0)
    head = spec.Head(spec.Norm(16, 1e-6), 31)
    every = blocks.module(head, torch.float32)
    last = blocks.module(dataclasses.replace(head, last=True), torch.float32)
    state = {n: torch.randn(p.shape) for n, p in every.named_parameters()}
    hidden = torch.randn(2, tokens, 16)
    for module in (every, last):
        module.load_state_dict(state, assign=True)
    difference = compare(every(hidden)[:, -1:].detach().numpy(), last(hidden).detach().numpy())
    assert difference.excess(TOLERANCE["float32"]) <= 1
