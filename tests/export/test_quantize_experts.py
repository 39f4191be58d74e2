"""`--quantize` of experts that a checkpoint has in one tensor: they are written one by one, each rounded to nearest."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantised_checkpoints import tensor
from rounded import KINDS, RUNGS, export, nearest, ops_of_its_own, stored, tensors
from safetensors.torch import save_file
from tiny_configs import one_line
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from llmexport.export import archs, random_checkpoint, rounded_files
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.errors import ExportError
from llmexport.validate import validate

# Halves one below the other; their transposes, which the config says; rows that alternate, with biases.
WIDE = {"qwen3_5_moe": {}, "llama4": {"intermediate_size": 64}, "gpt_oss": {}}


def slow(*values: str) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def written(arch: str, folder: Path, part: str = "text") -> None:
    config = {**archs.load(arch).tiny, **WIDE[arch]} if part == "text" else None
    random_checkpoint.write(archs.load(arch), folder, config=config, dtype="bfloat16", part=part)


def rewrite(folder: Path, held: dict[str, np.ndarray]) -> None:
    """Other tensors in the place of a checkpoint's."""
    for path in folder.glob("model*"):
        path.unlink()
    save_file({n: tensor(a) for n, a in held.items()}, folder / "model.safetensors", {"format": "pt"})


def matrices(arch: str, held: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The experts of a checkpoint that has them in one tensor, by the modules that they become."""
    found = {}
    for name, stack in held.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            continue
        above, which = name.rsplit(".", 1)
        for e, matrix in enumerate(stack if arch == "qwen3_5_moe" else stack.swapaxes(1, 2)):
            if arch == "gpt_oss":
                found[f"{above}.{which}s.{e}"] = matrix
            elif which == "down_proj":
                found[f"{above}.{e}.down_proj"] = matrix
            else:
                gate, up = np.split(matrix, 2)
                found |= {f"{above}.{e}.gate_proj": gate, f"{above}.{e}.up_proj": up}
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", [slow("qwen3_5_moe"), "llama4", "gpt_oss"])
def test_each_expert_is_rounded_to_nearest(arch, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(rounded_files, "CHUNK", 1000)  # several chunks a matrix, the last one shorter
    written(arch, tmp_path / "in")
    made = export(tmp_path / "in", tmp_path / "out", kind, 32 if kind == "int4" else None)
    plain, held = tensors(tmp_path / "in"), tensors(tmp_path / "out")
    expected = matrices(arch, plain)
    assert len(expected) > 10
    for module, matrix in expected.items():
        numbers, scales = nearest(matrix, kind, 32 if kind == "int4" else matrix.shape[1])
        np.testing.assert_array_equal(held[f"{module}.weight_scale"], scales)
        np.testing.assert_array_equal(stored(held, module, kind), numbers)
    assert not [n for n in held if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    for name in plain.keys() & held.keys() - open_checkpoint(made.folder).matrices.keys():
        np.testing.assert_array_equal(held[name], plain[name])
    assert not [n for n in made.notes if "not rounded" in n]


@pytest.mark.parametrize(
    ("arch", "target"),
    [("gpt_oss", "onnxruntime")]
    + [slow("qwen3_5_moe", target) for target in ("portable", "onnxruntime")]
    + [slow("gpt_oss", "portable")]
    + [slow("llama4", target) for target in ("portable", "onnxruntime")],
)
def test_what_is_exported_is_right_and_is_a_checkpoint_of_its_own(target, arch, tmp_path):
    written(arch, tmp_path / "in")
    made = export(tmp_path / "in", tmp_path / "out", "int4", target=target)
    ops = ops_of_its_own(made, tmp_path / "in", target)
    # The routing weights of Llama 4 multiply what goes in.
    expected = target == "onnxruntime" and arch != "llama4"
    assert ("QMoE" in ops) is expected


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama4", "qwen3_5_moe"])
def test_experts_within_a_multimodal_checkpoint_are_rounded(arch, tmp_path):
    written(arch, tmp_path / "in", "all")
    made = export(tmp_path / "in", tmp_path / "out", "int8")
    config: dict[str, Any] = json.loads((made.folder / "config.json").read_text())
    assert config["text_config"].get("for_llm_compressor", False) is (arch == "llama4")
    assert len([n for n in open_checkpoint(made.folder).matrices if ".experts." in n]) > 10
    rungs = {r.key: r.status for r in validate(made.folder).rungs}
    assert [rungs[k] for k in RUNGS] == ["pass"] * 3


def test_experts_whose_rows_no_groups_fill_are_copied_one_by_one(tmp_path):
    arch = archs.load("gpt_oss")
    random_checkpoint.write(arch, tmp_path / "in", config={**arch.tiny, "intermediate_size": 48}, dtype="bfloat16")
    made = export(tmp_path / "in", tmp_path / "out", "int4")
    held, [stack] = (
        tensors(tmp_path / "out"),
        [a for n, a in tensors(tmp_path / "in").items() if n == "model.layers.1.mlp.experts.down_proj"],
    )
    for e, matrix in enumerate(stack):
        name = f"model.layers.1.mlp.experts.down_projs.{e}.weight"
        np.testing.assert_array_equal(held[name].view(np.int16), matrix.T.view(np.int16))
    assert any("no groups of 32 or more fill its rows of 48" in n for n in made.notes)
    rungs = {r.key: r.status for r in validate(made.folder).rungs}
    assert [rungs[k] for k in RUNGS] == ["pass"] * 3


def test_a_tied_head_is_rounded_too(tmp_path):
    arch = archs.load("gpt_oss")
    config = {**arch.tiny, "tie_word_embeddings": True}
    random_checkpoint.write(arch, tmp_path / "in", config=config, dtype="bfloat16")
    made = export(tmp_path / "in", tmp_path / "out", "int8", quantize_head=True)
    assert "lm_head.weight" in open_checkpoint(made.folder).matrices


MXFP4 = {**archs.load("gpt_oss").tiny, "quantization_config": {"quant_method": "mxfp4"}}


@pytest.mark.parametrize("kind", ["int4", slow("int8"), slow("fp8")])
def test_what_mxfp4_means_is_rounded_to_nearest(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(rounded_files, "CHUNK", 1000)
    # Shards between which numbers and their scales lie apart.
    random_checkpoint.write(archs.load("gpt_oss"), tmp_path / "in", config=MXFP4, shard_bytes=8000)
    placed = open_checkpoint(tmp_path / "in").tensors
    pairs = {n: n.replace("_blocks", "_scales") for n in placed if n.endswith("_blocks")}
    assert {placed[a].file == placed[b].file for a, b in pairs.items()} == {True, False}
    made = export(tmp_path / "in", tmp_path / "out", kind, 32 if kind == "int4" else None)
    plain, held = tensors(tmp_path / "in"), tensors(tmp_path / "out")
    for blocks, scales in pairs.items():
        module, which = blocks.removesuffix("_blocks").rsplit(".", 1)
        stack = convert_moe_packed_tensors(*(torch.from_numpy(plain[n]) for n in (blocks, scales))).mT
        assert stack.dtype == torch.bfloat16
        for e, matrix in enumerate(stack):
            rows = matrix.float().numpy().astype("bfloat16")
            numbers, own = nearest(rows, kind, 32 if kind == "int4" else rows.shape[1])
            np.testing.assert_array_equal(held[f"{module}.{which}s.{e}.weight_scale"], own)
            np.testing.assert_array_equal(stored(held, f"{module}.{which}s.{e}", kind), numbers)
    assert not [n for n in held if n.endswith(("_blocks", "_scales"))]
    assert json.loads((made.folder / "config.json").read_text())["quantization_config"]["quant_method"] != "mxfp4"
    assert not [n for n in made.notes if "not rounded" in n]


@pytest.mark.parametrize("target", ["onnxruntime", slow("portable")])
def test_what_is_exported_of_mxfp4_is_right_and_is_a_checkpoint_of_its_own(target, tmp_path):
    random_checkpoint.write(archs.load("gpt_oss"), tmp_path / "in", config=MXFP4, dtype="bfloat16")
    made = export(tmp_path / "in", tmp_path / "out", "int4", target=target)
    ops = ops_of_its_own(made, tmp_path / "in", target)
    assert ("QMoE" in ops) is (target == "onnxruntime")


@pytest.mark.parametrize("flat", [True, slow(False)])
def test_mxfp4_is_rounded_whether_its_blocks_are_apart_or_not(flat, tmp_path):
    random_checkpoint.write(archs.load("gpt_oss"), tmp_path / "in", config=MXFP4, dtype="bfloat16")
    held = tensors(tmp_path / "in")
    flatten = [n for n in held if n.endswith("_blocks")] if flat else []
    rewrite(tmp_path / "in", held | {n: held[n].reshape(*held[n].shape[:2], -1) for n in flatten})
    made = export(tmp_path / "in", tmp_path / "out", "int8")
    assert len([n for n in open_checkpoint(made.folder).matrices if ".experts." in n]) > 10


def test_experts_in_16_bits_are_rounded_where_a_config_speaks_of_those_in_4(tmp_path):
    said = {"quant_method": "mxfp4", "dequantize": True}
    config = {**archs.load("gpt_oss").tiny, "quantization_config": said}
    random_checkpoint.write(archs.load("gpt_oss"), tmp_path / "in", config=config, dtype="bfloat16")
    made = export(tmp_path / "in", tmp_path / "out", "int8")
    assert len([n for n in open_checkpoint(made.folder).matrices if ".experts." in n]) > 10


# The last layer's, which is read after those before were taken apart.
@pytest.mark.parametrize("change", ["columns", "type", "taken"])
def test_mxfp4_that_is_not_as_it_is_published_is_not_rounded(change, tmp_path):
    random_checkpoint.write(archs.load("gpt_oss"), tmp_path / "in", config=MXFP4, dtype="bfloat16")
    held = tensors(tmp_path / "in")
    name = max(n for n in held if n.endswith("down_proj_scales"))
    taken = name.replace("down_proj_scales", "down_projs.0.weight")
    changes = {"columns": {name: held[name][:, :-1]}, "type": {name: held[name].astype(np.int32)}}
    changes["taken"] = {taken: np.zeros((2, 2), np.float32)}
    rewrite(tmp_path / "in", held | {n: np.ascontiguousarray(a) for n, a in changes[change].items()})
    with pytest.raises(ExportError, match=taken if change == "taken" else name) as error:
        export(tmp_path / "in", tmp_path / "out", "int4")
    one_line(error.value)
    assert not (tmp_path / "out").exists()


# In floats nobody says so in the config.
@pytest.mark.parametrize("arch", ["gpt_oss", "llama4"])
def test_experts_in_floats_one_by_one_are_read_too(arch, tmp_path):
    written(arch, tmp_path / "in")
    held = tensors(tmp_path / "in")
    apart = {f"{module}.weight": matrix for module, matrix in matrices(arch, held).items()}
    left = {n: a for n, a in held.items() if not n.endswith(("experts.gate_up_proj", "experts.down_proj"))}
    rewrite(tmp_path / "in", {n: np.ascontiguousarray(a) for n, a in (left | apart).items()})
    made = export(tmp_path / "in", tmp_path / "out", None)
    rungs = {r.key: r.status for r in validate(made.folder).rungs}
    assert [rungs[k] for k in RUNGS] == ["pass"] * 3


def test_what_is_wrong_with_a_stack_is_said_of_its_file(tmp_path):
    written("gpt_oss", tmp_path / "in")
    held, name = tensors(tmp_path / "in"), "model.layers.1.mlp.experts.down_proj"
    held[name][2, 3, 4] = np.nan
    rewrite(tmp_path / "in", held)
    says = f"model.safetensors: '{name}s.2.weight' holds a number that is not finite"
    with pytest.raises(ExportError, match=re.escape(says)):
        export(tmp_path / "in", tmp_path / "out", "int8")
    assert not (tmp_path / "out").exists()
    rewrite(tmp_path / "in", {**held, name: np.zeros(held[name].shape, np.int32)})
    with pytest.raises(ExportError, match=re.escape(f"{name} is stored as I32")):
        export(tmp_path / "in", tmp_path / "out", "int8")
