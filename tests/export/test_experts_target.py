"""`--target onnxruntime`: experts in int4 are QMoE's, whose stacks the export writes as that reads them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from packed_exports import exported, logits
from quantised_checkpoints import FORMS, write
from reseal import reseal

from llmexport.export import archs, onnx_file, random_checkpoint
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.exported import Export
from llmexport.export.packed.repack import FILE
from llmexport.validate import bound, ladder, runtime, validate
from llmexport.validate.compare import Mismatch, compare
from llmexport.validate.tolerance import TOLERANCE

# All in four bits whose columns are in one order and without factors of their own.
INT4 = [n for n in FORMS if n.startswith(("gptq", "awq", "w4a16")) and "act-order" not in n]
INT4 = [n for n in INT4 if n not in ("gptq-8-bits", "w4a16-modelopt")]
STACK = "model.layers.0.block_sparse_moe.experts."


def file_of(export: Export) -> onnx.ModelProto:
    return onnx.load(export.folder / "model.onnx", load_external_data=False)


@pytest.mark.parametrize("form", INT4)
def test_experts_in_int4_are_written_in_turn_and_mean_the_same(form, tmp_path):
    write(tmp_path, form, "mixtral")
    export, plain = exported(tmp_path, "ck", target="onnxruntime"), exported(tmp_path, "meant")
    fused = export.graphs[0].fusions["lower_experts"]
    assert (fused.count, fused.refused) == (3, [])
    model, checkpoint = file_of(export), export.checkpoint()
    assert [n.domain for n in model.graph.node if n.op_type == "QMoE"] == ["com.microsoft"] * 3
    stacks = [t for t in model.graph.initializer if t.name.startswith(STACK)]
    assert {e.value for t in stacks for e in t.external_data if e.key == "location"} == {FILE}
    codes = checkpoint.read(f"{STACK}gate_up_proj")[2]
    gate, up = (checkpoint.matrices[f"{STACK}2.{n}.weight"].numbers(checkpoint.read) for n in ("w1", "w3"))
    assert np.array_equal(np.stack((codes & 15, codes >> 4), -1).reshape(len(codes), -1)[::2], gate)
    assert np.array_equal(np.stack((codes & 15, codes >> 4), -1).reshape(len(codes), -1)[1::2], up)
    assert bound.wrong(export, export.graphs[0], model) == {}
    assert compare(logits(plain), logits(export)).excess(TOLERANCE["float32"]) <= 1


@pytest.mark.parametrize("form", ["w8a16", "gptq-act-order"])
def test_what_qmoe_would_round_or_does_not_read_stays(form, tmp_path):
    write(tmp_path, form, "mixtral")
    export, plain = exported(tmp_path, "ck", target="onnxruntime"), exported(tmp_path, "meant")
    assert export.graphs[0].fusions["lower_experts"].count == 0
    assert "QMoE" not in {n.op_type for n in file_of(export).graph.node}
    assert compare(logits(plain), logits(export)).excess(TOLERANCE["float32"]) <= 1


# The router scales weights and does not renormalise them; those of a mixer are no op's.
@pytest.mark.parametrize(("arch", "layers"), [("deepseek_v3", 2), ("phimoe", 3)])
def test_experts_that_are_rounded_here_are_validated(arch, layers, tmp_path):
    random_checkpoint.write(archs.load(arch), tmp_path / "in")
    request = onnx_file.Request(
        archs.load(arch), open_checkpoint(tmp_path / "in"), target="onnxruntime", quantize="int4"
    )
    export = onnx_file.write(request, tmp_path / "out")
    fused = export.graphs[0].fusions["lower_experts"]
    assert (fused.count, fused.refused) == (layers, [])
    rungs = {r.key: r.status for r in validate(export.folder).rungs}
    assert [rungs[k] for k in ("transformers", "blocks", "onnxruntime")] == ["pass"] * 3


def test_floats_of_experts_that_no_group_fits_are_joined_after_the_others_are_rounded(tmp_path):
    config = {**archs.load("mixtral").tiny, "intermediate_size": 120}
    random_checkpoint.write(archs.load("mixtral"), tmp_path / "in", config=config)
    request = onnx_file.Request(
        archs.load("mixtral"), open_checkpoint(tmp_path / "in"), target="onnxruntime", quantize="int4"
    )
    export = onnx_file.write(request, tmp_path / "out")
    assert any("down_proj" in n or "w2" in n for n in export.notes)
    rungs = {r.key: r.status for r in validate(export.folder).rungs}
    assert [rungs[k] for k in ("transformers", "blocks", "onnxruntime")] == ["pass"] * 3


def test_a_wrong_node_of_experts_is_found_and_a_right_one_is_not(tmp_path):
    write(tmp_path, "awq", "mixtral")
    export = exported(tmp_path, "ck", target="onnxruntime")
    report = ladder.climb(export, rungs=["blocks"], bisect=True)
    assert (report.passed, report.bisect.found) == (True, False)
    model = file_of(export)
    [node] = [n for n in model.graph.node if n.op_type == "QMoE" and n.name.startswith("layers.1/")]
    next(a for a in node.attribute if a.name == "activation_alpha").f = 1.5
    (export.folder / "model.onnx").write_bytes(model.SerializeToString())
    reseal(export.folder)
    found = validate(export.folder, rungs=["blocks"], bisect=True).bisect
    assert found.block["step"] == "layers.1"
    assert (found.node.name, "activation_alpha is 1.5" in found.node.said) == (node.name, True)


def test_an_older_onnx_runtime_is_told_what_it_lacks(tmp_path, monkeypatch):
    write(tmp_path, "awq", "mixtral")
    export = exported(tmp_path, "ck", target="onnxruntime")
    monkeypatch.setattr(runtime.onnxruntime, "__version__", "1.25.1")
    with pytest.raises(Mismatch, match="whose QMoE takes no weights of a router, and this model's experts are its"):
        logits(export)
