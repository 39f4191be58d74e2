"""`--quantize` of checkpoints in FP8: the numbers that their weights mean are rounded, as if they were stored so."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
import pytest
import quantised_checkpoints
from rounded import KINDS, export, tensors
from tiny_configs import one_line

from llmexport.export import rounded_files
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.errors import ExportError
from llmexport.validate import validate

FP8 = [n for n in quantised_checkpoints.FORMS if n.startswith(("fp8", "fbgemm"))]
RUNGS = ("transformers", "blocks", "onnxruntime")


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


# Chunks of a row of blocks, and of several, the last one shorter.
@pytest.mark.parametrize("chunk", [1, 5000])
@pytest.mark.parametrize("form", FP8)
def test_what_each_form_means_is_rounded_as_the_same_numbers_in_floats(form, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(rounded_files, "CHUNK", chunk)
    source = quantised_checkpoints.write(tmp_path, form)
    for kind in KINDS:
        made = export(source, tmp_path / kind, kind)
        export(tmp_path / "meant", tmp_path / f"of floats, {kind}", kind)
        held = open_checkpoint(made.folder)
        assert len(held.matrices) == len(open_checkpoint(source).matrices) > 10
        # What is copied is stored as it was, and in float32 where the other has it so.
        kept = [n for n, t in open_checkpoint(source).tensors.items() if n in held.tensors and t.dtype == "BF16"]
        rewritten = {n: tensors(tmp_path / kind)[n].astype(np.float32) for n in kept}
        expected = tensors(tmp_path / f"of floats, {kind}")
        assert held.tensors.keys() == expected.keys()
        for name, array in (tensors(tmp_path / kind) | rewritten).items():
            assert array.dtype == expected[name].dtype, name
            assert array.tobytes() == expected[name].tobytes(), name


@pytest.mark.parametrize(("arch", "target"), [("llama", "portable"), ("qwen3_moe", "onnxruntime")])
@pytest.mark.parametrize("form", ["fp8-block", slow("fp8-dynamic"), slow("fp8-tensor")])
def test_what_is_exported_is_right_and_is_a_checkpoint_of_its_own(form, arch, target, tmp_path):
    source = quantised_checkpoints.write(tmp_path, form, arch)
    made = export(source, tmp_path / "out", "int4", 32, target=target)
    rungs = {r.key: r.status for r in validate(made.folder).rungs}
    assert [rungs[k] for k in RUNGS] == ["pass"] * 3
    again = export(made.folder, tmp_path / "again", None, target=target)
    graph = (made.folder / "model.onnx").read_bytes()
    assert (again.folder / "model.onnx").read_bytes() == graph
    said = json.loads((made.folder / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "compressed-tensors"
    ops = [n.op_type for n in onnx.load_from_string(graph).graph.node]
    assert ("QMoE" in ops) is (target == "onnxruntime")
    moved = validate(made.folder, rungs=["transformers"], reference=source).moved
    assert moved is not None
    assert moved.tokens


@pytest.mark.slow
def test_experts_beside_latents_are_rounded_too(tmp_path):
    source = quantised_checkpoints.write(tmp_path, "fp8-block", "deepseek_v3")
    made = export(source, tmp_path / "out", "int4", 32)
    names = open_checkpoint(made.folder).matrices
    assert len([n for n in names if ".experts." in n]) > 10
    rungs = {r.key: r.status for r in validate(made.folder).rungs}
    assert [rungs[k] for k in RUNGS] == ["pass"] * 3


def test_what_modelopt_says_in_a_file_of_its_own_stays_behind(tmp_path):
    source = quantised_checkpoints.write(tmp_path, "fp8-modelopt")
    (source / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    made = export(source, tmp_path / "out", "int4")
    assert not (made.folder / "hf_quant_config.json").exists()
    kept = export(source, tmp_path / "as it is", None)
    assert (kept.folder / "hf_quant_config.json").exists()


# Of what no config.json says.
def test_fp8_of_a_file_of_its_own_alone_is_refused(tmp_path):
    source = quantised_checkpoints.write(tmp_path, "fp8-modelopt")
    config = json.loads((source / "config.json").read_text())
    said = config.pop("quantization_config")
    (source / "config.json").write_text(json.dumps(config))
    (source / "hf_quant_config.json").write_text(json.dumps({"producer": said["producer"], "quantization": said}))
    assert open_checkpoint(source).matrices
    with pytest.raises(ExportError, match="is quantised, and is exported as it is: leave --quantize out"):
        export(source, tmp_path / "out", "int4")


@pytest.mark.parametrize("form", [n for n in quantised_checkpoints.FORMS if n not in FP8])
def test_whatever_else_is_in_few_bits_is_refused(form, tmp_path):
    source = quantised_checkpoints.write(tmp_path, form)
    with pytest.raises(ExportError, match="is quantised, and is exported as it is: leave --quantize out") as error:
        export(source, tmp_path / "out", "int4")
    one_line(error.value)
    assert not (tmp_path / "out").exists()


def test_scales_that_are_no_numbers_are_refused(tmp_path):
    source = quantised_checkpoints.write(tmp_path, "fp8-block")
    held = tensors(source)
    name = next(n for n in held if n.endswith("o_proj.weight_scale_inv"))
    held[name] = np.full_like(held[name], np.inf)
    for path in source.glob("model*"):
        path.unlink()
    config = json.loads((source / "config.json").read_text())
    source.rename(tmp_path / "gone")
    quantised_checkpoints.save(source, config, held)
    with pytest.raises(ExportError, match=r"o_proj\.weight' holds a number that is not finite") as error:
        export(source, tmp_path / "out", "int4")
    one_line(error.value)
    assert not (tmp_path / "out").exists()
