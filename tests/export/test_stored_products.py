"""`--target onnxruntime`: products by stored matrices are FusedMatMul, which reads these as they lie."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx.parser
import pytest
from packed_exports import exported
from quantised_checkpoints import write

from llmexport.export.exported import Export
from llmexport.export.stored_products import read_as_stored

HEADER = '<ir_version: 10, opset_import: ["": 24]> g (float[B,T,4] x, float[N,4] flat, float[8,4] w, float[4,8] v)'
FUSED = {
    "a product": "t = Transpose<perm = [1, 0]>(w) y = MatMul(x, t)",
    "two": "t = Transpose<perm = [1, 0]>(w) a = MatMul(x, t) b = MatMul(x, t) y = Add(a, b)",
}
LEFT = {
    "of rows alone, whose bias a Gemm adds": "t = Transpose<perm = [1, 0]>(w) y = MatMul(flat, t)",
    "by a weight [in, out]": "y = MatMul(x, v)",
    "by one that is read besides": "t = Transpose<perm = [1, 0]>(w) a = MatMul(x, t) b = Neg(t) y = MatMul(a, w)",
    "by one that a branch reads": "t = Transpose<perm = [1, 0]>(w) a = MatMul(x, t) y = If(c) <then_branch = p () "
    "=> (float[] n) { n = Neg(t) }, else_branch = q () => (float[] m) { m = Abs(a) }>",
    "by one that is given": "y = Transpose<perm = [1, 0]>(w) z = MatMul(x, y)",
    "of one by itself": "t = Transpose<perm = [1, 0]>(w) y = MatMul(t, w)",
    "by what no weight is": "s = Neg(w) t = Transpose<perm = [1, 0]>(s) y = MatMul(x, t)",
}  # fmt: skip


def read(nodes: str) -> tuple[onnx.GraphProto, onnx.GraphProto]:
    """The graph of these nodes before and after."""
    made = onnx.parser.parse_model(f"{HEADER} => (float[] y) <bool c = {{1}}> {{ {nodes} }}").graph
    before = onnx.GraphProto.FromString(made.SerializeToString())
    read_as_stored(made, {"w", "v"})
    return before, made


@pytest.mark.parametrize("nodes", FUSED.values(), ids=FUSED)
def test_a_product_by_the_transpose_of_a_weight_reads_the_weight(nodes: str) -> None:
    before, after = read(nodes)
    products = [n for n in after.node if n.op_type == "FusedMatMul"]
    assert len(products) == sum(n.op_type == "MatMul" for n in before.node)
    assert "Transpose" not in {n.op_type for n in after.node}
    for node in products:
        assert (list(node.input), node.domain) == (["x", "w"], "com.microsoft")
        assert [(a.name, a.i) for a in node.attribute] == [("transB", 1)]
    assert [list(n.output) for n in after.node] == [list(n.output) for n in before.node if n.op_type != "Transpose"]


@pytest.mark.parametrize("nodes", LEFT.values(), ids=LEFT)
def test_others_are_left(nodes: str) -> None:
    before, after = read(nodes)
    assert after == before


def products(export: Export) -> list[onnx.NodeProto]:
    graph = onnx.load(export.folder / "model.onnx", load_external_data=False).graph
    return [n for n in graph.node if n.op_type in ("MatMul", "FusedMatMul")]


def test_every_product_of_a_model_in_fp32_reads_a_weight_and_no_other_export_has_one(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "ck").symlink_to(tiny_checkpoint("qwen2"))
    export = exported(tmp_path, "ck", target="onnxruntime")
    names = {p.input[1].removesuffix("/cast") for p in products(export)}
    assert {p.op_type for p in products(export)} == {"FusedMatMul"}
    assert names == {n for n, t in export.checkpoint().tensors.items() if len(t.shape) == 2}
    for kind in ({}, {"target": "onnxruntime", "dtype": "float16"}, {"target": "tensorrt"}):
        shutil.rmtree(export.folder)
        assert {p.op_type for p in products(exported(tmp_path, "ck", **kind))} == {"MatMul"}


@pytest.mark.parametrize("form", ["w4a16", "gptq", "fp8-block"])
def test_what_is_in_few_bits_is_made_as_before(form: str, tmp_path: Path) -> None:
    """The head and what else is published in floats is not."""
    write(tmp_path, form, "llama")
    export = exported(tmp_path, "ck", target="onnxruntime")
    matrices = export.checkpoint().matrices.keys()
    read = {p.input[1].removesuffix("/cast") for p in products(export) if p.op_type == "FusedMatMul"}
    assert read
    assert read.isdisjoint(matrices)
