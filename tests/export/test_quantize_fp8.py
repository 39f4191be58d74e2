"""`--quantize` of checkpoints in FP8: the numbers that their weights mean are rounded, as if they were stored so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import quantised_checkpoints
from rounded import KINDS, RUNGS, export, ops_of_its_own, tensors
from safetensors.torch import save_file
from tiny_configs import one_line

from llmexport.export import archs, rounded_files
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.errors import ExportError
from llmexport.validate import validate

FP8 = [n for n in quantised_checkpoints.FORMS if n.startswith(("fp8", "fbgemm"))]
QUICK = ("fp8-block", "fp8-dynamic", "gptq", "nvfp4")


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def in_16_bits(tmp_path: Path) -> Path:
    """What the weights of a checkpoint mean, as a checkpoint in bfloat16."""
    held = {n: a.astype(ml_dtypes.bfloat16) for n, a in tensors(tmp_path / "meant").items()}
    quantised_checkpoints.save(tmp_path / "16", json.loads((tmp_path / "meant/config.json").read_text()), held)
    return tmp_path / "16"


def same(folder: Path, other: Path) -> None:
    held, expected = tensors(folder), tensors(other)
    assert held.keys() == expected.keys()
    assert not [n for n, a in expected.items() if held[n].dtype != a.dtype or held[n].tobytes() != a.tobytes()]


def spread(folder: Path, held: dict[str, np.ndarray]) -> None:
    """The checkpoint with these tensors, each in a shard of its own."""
    for path in folder.glob("model*"):
        path.unlink()
    names = {n: f"model-{i:05}.safetensors" for i, n in enumerate(held)}
    for name, array in held.items():
        save_file({name: quantised_checkpoints.tensor(array)}, folder / names[name], {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


# Chunks of a row of blocks, and of several, the last one shorter.
@pytest.mark.parametrize("chunk", [1, 5000])
@pytest.mark.parametrize("form", [n if n in QUICK else slow(n) for n in FP8])
def test_what_each_form_means_is_rounded_as_the_same_numbers_in_16_bits(form, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(rounded_files, "CHUNK", chunk)
    source = quantised_checkpoints.write(tmp_path, form)
    plain = in_16_bits(tmp_path)
    for kind in KINDS:
        made = export(source, tmp_path / kind, kind)
        export(plain, tmp_path / f"of 16 bits, {kind}", kind)
        assert open_checkpoint(made.folder).matrices.keys() == open_checkpoint(source).matrices.keys()
        same(made.folder, tmp_path / f"of 16 bits, {kind}")


def test_numbers_and_scales_in_other_shards_and_scales_of_a_cache_change_nothing(tmp_path):
    source = quantised_checkpoints.write(tmp_path, "fp8-block")
    export(source, tmp_path / "one file", "int4")
    held = tensors(source)
    spread(source, held | {"model.layers.0.self_attn.k_scale": np.float32(0.5)})
    made = export(source, tmp_path / "shards", "int4")
    same(made.folder, tmp_path / "one file")


# A head in FP8, and rows that no group fills.
def test_what_is_not_rounded_is_written_in_16_bits_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr(quantised_checkpoints, "KEPT", ("embed", "norm"))
    config = {**archs.load("llama").tiny, "intermediate_size": 64 + 16}
    source = quantised_checkpoints.write(tmp_path, "fp8-tensor", config=config)
    head = "lm_head.weight"
    assert head in open_checkpoint(source).matrices
    made = export(source, tmp_path / "out", "int4", 32)
    assert f"int4: '{head}' is written in bfloat16: it was in few bits, and is not rounded" in made.notes
    np.testing.assert_array_equal(tensors(made.folder)[head], tensors(in_16_bits(tmp_path))[head])
    whole = export(source, tmp_path / "whole", "int4", 32, quantize_head=True)
    assert head in open_checkpoint(whole.folder).matrices


def test_a_table_that_is_stored_twice_in_fp8_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(quantised_checkpoints, "KEPT", ("norm",))
    config = {**archs.load("llama").tiny, "tie_word_embeddings": True}
    source = quantised_checkpoints.write(tmp_path, "fp8-tensor", config={**config, "tie_word_embeddings": False})
    (source / "config.json").write_text(
        json.dumps(json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": True})
    )
    for kind in (None, "int4"):
        with pytest.raises(ExportError, match=r"config\.json says tie_word_embeddings") as error:
            export(source, tmp_path / "out", kind)
        one_line(error.value)


@pytest.mark.parametrize(("arch", "target"), [("llama", "portable"), ("qwen3_moe", "onnxruntime")])
@pytest.mark.parametrize("form", ["fp8-block", slow("fp8-dynamic"), slow("fp8-tensor")])
def test_what_is_exported_is_right_and_is_a_checkpoint_of_its_own(form, arch, target, tmp_path):
    source = quantised_checkpoints.write(tmp_path, form, arch)
    made = export(source, tmp_path / "out", "int4", 32, target=target)
    said = json.loads((made.folder / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "compressed-tensors"
    ops = ops_of_its_own(made, source, target)
    assert ("QMoE" in ops) is (target == "onnxruntime")


@pytest.mark.slow
def test_experts_beside_latents_are_rounded_too(tmp_path):
    source = quantised_checkpoints.write(tmp_path, "fp8-block", "deepseek_v3")
    made = export(source, tmp_path / "out", "int4", 32)
    assert open_checkpoint(made.folder).matrices.keys() == open_checkpoint(source).matrices.keys()
    rungs = {r.key: r.status for r in validate(made.folder).rungs}
    assert [rungs[k] for k in RUNGS] == ["pass"] * 3


def test_what_modelopt_says_in_a_file_of_its_own_stays_behind(tmp_path):
    source = quantised_checkpoints.write(tmp_path, "fp8-modelopt")
    (source / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    made = export(source, tmp_path / "out", "int4")
    assert not (made.folder / "hf_quant_config.json").exists()
    kept = export(source, tmp_path / "as it is", None)
    assert (kept.folder / "hf_quant_config.json").exists()


def test_fp8_that_a_file_of_its_own_speaks_of_is_rounded(tmp_path):
    source = quantised_checkpoints.write(tmp_path, "fp8-modelopt")
    export(source, tmp_path / "expected", "int4")
    config = json.loads((source / "config.json").read_text())
    said = config.pop("quantization_config")
    (source / "config.json").write_text(json.dumps(config))
    (source / "hf_quant_config.json").write_text(json.dumps({"producer": said["producer"], "quantization": said}))
    made = export(source, tmp_path / "out", "int4")
    same(made.folder, tmp_path / "expected")
    assert not (made.folder / "hf_quant_config.json").exists()


def test_stacks_in_fp8_are_refused_by_name(tmp_path):
    source = quantised_checkpoints.write(tmp_path, "fp8-block", "qwen3_5_moe", stacks="blocks")
    with pytest.raises(ExportError, match=r"or with experts one by one, not as in '.*experts\.down_proj'") as error:
        export(source, tmp_path / "out", "int4")
    one_line(error.value)


@pytest.mark.parametrize("form", [n if n in QUICK else slow(n) for n in quantised_checkpoints.FORMS if n not in FP8])
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
