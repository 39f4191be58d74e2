"""`--target onnxruntime`: products by matrices in few bits are MatMulNBits, by the bytes as they are published."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from first_feed import first_feed
from packed_exports import exported, logits
from quantised_checkpoints import write

from llmexport.export.exported import Export
from llmexport.export.packed.repack import FILE
from llmexport.graphs import pipeline
from llmexport.graphs.lower_add_rms_norm import lower_add_rms_norm
from llmexport.validate import bound, stages, validate
from llmexport.validate.compare import compare
from llmexport.validate.tolerance import TOLERANCE

# Bits of those whose numbers lie as the operator reads them; the others are left to DequantizeLinear.
DIRECT = {"w4a16": 4, "w8a16": 8}
OTHERS = ["w4a16-asymmetric", "w4a16-act-order", "gptq", "awq", "w8a8"]
NAME = "model.layers.0.mlp.down_proj.weight"


def products(export: Export) -> list[onnx.NodeProto]:
    model = onnx.load(export.folder / "model.onnx", load_external_data=False)
    return [n for n in model.graph.node if n.op_type == "MatMulNBits"]


@pytest.mark.parametrize("form", DIRECT)
def test_products_read_the_bytes_where_they_are_published(form, tmp_path):
    write(tmp_path, form, "llama")
    export, plain = exported(tmp_path, "ck", target="onnxruntime"), exported(tmp_path, "meant")
    model = onnx.load(export.folder / "model.onnx", load_external_data=False)
    assert "DequantizeLinear" not in {n.op_type for n in model.graph.node}
    assert FILE not in [w.file for w in export.weights]
    checkpoint = export.checkpoint()
    found = products(export)
    assert {n.input[1] for n in found} == {m.values for m in checkpoint.matrices.values()}
    matrix = checkpoint.matrices[NAME]
    [node] = [n for n in found if n.input[1] == matrix.values]
    said = {a.name: a.i for a in node.attribute}
    rows, columns = matrix.shape
    assert said == {"N": rows, "K": columns, "bits": DIRECT[form], "block_size": 32, "accuracy_level": 4}
    assert bound.wrong(export, export.graphs[0], model) == {}
    assert compare(logits(plain), logits(export)).excess(TOLERANCE["float32"]) <= 1


@pytest.mark.parametrize("form", OTHERS)
def test_numbers_that_lie_otherwise_are_left_to_dequantize_linear(form, tmp_path):
    write(tmp_path, form, "llama")
    export, plain = exported(tmp_path, "ck", target="onnxruntime"), exported(tmp_path, "meant")
    assert products(export) == []
    assert compare(logits(plain), logits(export)).excess(TOLERANCE["float32"]) <= 1


@pytest.mark.parametrize("kind", [{}, {"target": "onnxruntime", "dtype": "float16"}])
def test_other_exports_have_none(kind, tmp_path):
    write(tmp_path, "w4a16", "llama")
    assert products(exported(tmp_path, "ck", **kind)) == []


def both(tmp_path):
    """For the target, and portable."""
    write(tmp_path, "w4a16", "llama")
    export, portable = exported(tmp_path, "ck", target="onnxruntime"), tmp_path / "portable"
    (tmp_path / "ck").rename(portable)
    return export, exported(tmp_path, "portable")


def test_it_rounds_what_it_multiplies_as_a_fused_product_does_unless_it_is_validated(tmp_path, monkeypatch):
    # A norm that differs in its last bits is rounded to another int8 here and there.
    passes = [p for p in pipeline.LOWERING["onnxruntime"] if p is not lower_add_rms_norm]
    monkeypatch.setitem(pipeline.LOWERING, "onnxruntime", tuple(passes))
    export, portable = both(tmp_path)
    fused = logits(portable, fused=True)
    assert compare(fused, logits(export, fused=True)).excess(TOLERANCE["float32"]) <= 1
    assert compare(fused, logits(export)).excess(TOLERANCE["float32"]) > 1
    feed = first_feed(export.graphs[0], stages.prompt(export), export.dtype)
    plain = onnxruntime.InferenceSession(export.folder / "model.onnx", providers=["CPUExecutionProvider"])
    assert np.array_equal(plain.run(["logits"], feed)[0], logits(export, fused=True))


def test_with_norms_of_the_runtime_it_differs_by_less_than_that_rounding(tmp_path):
    export, portable = both(tmp_path)
    fused, exact = logits(portable, fused=True), logits(portable)
    assert compare(fused, logits(export, fused=True)).rms_ratio < compare(exact, fused).rms_ratio / 2


def test_it_is_validated_and_a_wrong_binding_is_found(tmp_path):
    write(tmp_path, "w4a16", "llama")
    export = exported(tmp_path, "ck", target="onnxruntime")
    rungs = {r.key: r.status for r in validate(export.folder).rungs}
    assert [rungs[k] for k in ("transformers", "blocks", "onnxruntime")] == ["pass"] * 3
    model = onnx.load(export.folder / "model.onnx", load_external_data=False)
    up, gate = (
        next(t for t in model.graph.initializer if t.name == f"model.layers.1.mlp.{n}_proj.weight_packed")
        for n in ("up", "gate")
    )
    offset = {e.key: e for e in up.external_data}["offset"]
    offset.value = next(e.value for e in gate.external_data if e.key == "offset")
    [(name, said)] = bound.wrong(export, export.graphs[0], model).items()
    assert (name, "other numbers" in said) == (up.name, True)
