"""Experts that a checkpoint has quantised in one tensor: MoeExperts reads them packed."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from arch_cases import others_slow
from commands import runner
from engine_folder import of_engine
from native import emulated_library
from packed_exports import exported, logits, storages
from quantised_checkpoints import STACKS, write
from rungs import EVERYWHERE
from safetensors.torch import load_file, save_file

from llmexport.export import archs, engine, graph_file
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.errors import ExportError
from llmexport.export.onnx_file import Request, open_model
from llmexport.export.packed.repack import FILE, with_repacked
from llmexport.export.spec import Packed
from llmexport.export.wanted import wanted_graphs
from llmexport.validate import bound, validate
from llmexport.validate.compare import compare
from llmexport.validate.tolerance import TOLERANCE

# Rows of gate and up in halves or in turn, biases, a routing weight that multiplies what goes in.
SIZES = {"llama4": {"intermediate_size": 64}, "gpt_oss": {}, "qwen3_5_moe": {}}
CASES = [
    *(("qwen3_5_moe", s) for s in ("blocks", "blocks-of-powers", "matrices")),
    *(("llama4", s) for s in ("fbgemm", "modelopt", "modelopt-experts", "modelopt-nvfp4")),
    *(("gpt_oss", s) for s in ("modelopt", "modelopt-nvfp4")),
]
# One that is bound as it lies, and one that is turned.
ONCE = [("qwen3_5_moe", "blocks"), ("llama4", "modelopt-nvfp4")]
# Wide enough that experts are most of an engine.
WIDE = {
    "llama4": {"hidden_size": 256, "intermediate_size": 512, "num_local_experts": 8},
    "gpt_oss": {"hidden_size": 256, "intermediate_size": 512, "num_local_experts": 8},
    "qwen3_5_moe": {"hidden_size": 256, "moe_intermediate_size": 512},
}
IN_PLACE = ("blocks", "blocks-of-powers", "matrices")


def written(folder: Path, arch: str, stacks: str, **sizes: int) -> None:
    config = {**archs.load(arch).tiny, **SIZES[arch], **sizes}
    write(folder, STACKS[stacks][0], arch, config, stacks)


@pytest.fixture(params=[c if c in ONCE else pytest.param(c, marks=pytest.mark.slow) for c in CASES], ids="-".join)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    written(tmp_path, *request.param)
    return request.param[1], tmp_path


def test_numbers_are_what_the_formula_says(case):
    _, folder = case
    packed, meant = open_checkpoint(folder / "ck"), open_checkpoint(folder / "meant")
    stacks = [n for n, m in packed.matrices.items() if m.experts]
    assert stacks
    for name in stacks:
        assert packed.values(name).shape == meant.read(name).shape
        assert compare(meant.read(name), packed.values(name)).max_abs <= 1e-7


def test_experts_compute_with_what_their_numbers_mean(case):
    stacks, folder = case
    ours, plain = exported(folder, "ck"), exported(folder, "meant")
    [storage] = storages(ours)
    assert isinstance(storage, Packed)
    expected = logits(plain)
    assert np.abs(expected).max() > 0.5
    difference = compare(expected, logits(ours))
    assert difference.max_abs <= 1e-5
    assert difference.rms_ratio <= 1e-6
    assert "stacks of experts of float" in ours.notes[0]
    # Numbers whose bytes an op reads lie where they lay.
    [graph], checkpoint = ours.graphs, ours.checkpoint()
    assert (FILE in [w.file for w in ours.weights]) is (stacks not in IN_PLACE)
    assert bound.wrong(ours, graph, graph_file.load(ours, graph)) == {}
    assert checkpoint.matrices.keys() == open_checkpoint(folder / "ck").matrices.keys()


def test_every_rung_passes(case):
    _, folder = case
    report = validate(exported(folder, "ck").folder, rungs=[*EVERYWHERE, "network"])
    assert [(r.key, r.status) for r in report.rungs] == [(k, "pass") for k in (*EVERYWHERE, "network")]


def test_the_form_for_onnx_runtime_computes_the_same(case):
    _, folder = case
    ours, plain = exported(folder, "ck", target="onnxruntime"), exported(folder, "meant")
    assert compare(logits(plain), logits(ours)).excess(TOLERANCE["float32"]) <= 1


@pytest.mark.engine
@pytest.mark.parametrize(
    ("arch", "stacks"),
    others_slow(
        [("qwen3_5_moe", "blocks"), ("llama4", "fbgemm"), ("gpt_oss", "modelopt-nvfp4")],
        [("gpt_oss", "modelopt-nvfp4")],
    ),
)
def test_the_plugin_of_an_engine_keeps_them_packed(arch, stacks, tmp_path):
    written(tmp_path, arch, stacks, **WIDE[arch])
    ours, plain = exported(tmp_path, "ck"), exported(tmp_path, "meant")
    for export in (ours, plain):
        plan = engine.build(export.folder, plugins=emulated_library()).graphs["model"]
        assert plan.plugins == of_engine(export.graphs[0].ops, plan.plugins)
    packed, wide = ((e.folder / "model.plan").stat().st_size for e in (ours, plain))
    matrices = [m for m in ours.checkpoint().matrices.values() if m.experts]
    numbers, bits = sum(m.shape[0] * m.shape[1] for m in matrices), matrices[0].bits
    # Scales may take an eighth of what was saved.
    assert wide - packed >= numbers * (4 - bits / 8) * 7 / 8


def test_a_stack_is_turned_expert_by_expert(tmp_path):
    written(tmp_path, "llama4", "fbgemm", hidden_size=256, intermediate_size=512, num_local_experts=16)
    request, model, _ = open_model(Request(archs.load("llama4"), open_checkpoint(tmp_path / "ck")))
    wanted = wanted_graphs(request.arch, request.checkpoint, model, None)[2]
    checkpoint, repacked = with_repacked(request.checkpoint, wanted)
    assert repacked
    (folder := tmp_path / "out").mkdir()
    tracemalloc.start()
    repacked.write(folder, checkpoint.read, whole=False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    stacks = [m.shape[0] * m.shape[1] for m in checkpoint.matrices.values() if m.experts]
    assert sum(stacks) > 10_000_000
    # gate and up of one of 16, and what is not of these numbers.
    assert peak < max(stacks) / 16 + 200_000


def test_how_far_quantisation_moved_the_logits_is_told(tmp_path):
    written(tmp_path, "llama4", "fbgemm")
    same = validate(exported(tmp_path, "ck").folder, rungs=["onnxruntime"], reference=tmp_path / "meant").moved
    assert same
    assert same.kl_max < 1e-8


Held = dict[str, torch.Tensor]
STACK = "model.layers.1.feed_forward.experts.down_proj"


def without(held: Held) -> None:
    del held[f"{STACK}_scale"]


def unquantised(held: Held) -> None:
    """This stack alone lies as before."""
    del held[f"{STACK}_scale"]
    held[STACK] = held[STACK].to(torch.bfloat16)


def retyped(held: Held) -> None:
    held[f"{STACK}_scale"] = held[f"{STACK}_scale"].to(torch.int8)


def shorter(held: Held) -> None:
    held[f"{STACK}_scale"] = held[f"{STACK}_scale"][:-1]


def turned(held: Held) -> None:
    """To [experts, outputs, inputs]."""
    held[STACK] = held[STACK].mT


def with_another(held: Held) -> None:
    held[f"{STACK}_scale_inv"] = torch.ones(4, 1, 1)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (without, f"'{STACK}' is F8_E4M3 without scales, and all matrices of an expert are quantised or none is"),
        (unquantised, f"'{STACK}' is BF16 without scales, and all matrices of an expert are quantised or none is"),
        (retyped, "_scale is I8, which fp8 has not"),
        (shorter, "_scale is [3, 64, 1], expected [4, 1, 64]"),
        (turned, "_scale is [4, 64, 1], expected [4, 1, 48]"),
        (with_another, "_scale_inv should not be there"),
    ],
)
def test_a_stack_that_is_not_as_it_is_said_is_refused_in_one_line(wrong, said, tmp_path, monkeypatch, capsys):
    written(tmp_path, "llama4", "fbgemm", intermediate_size=48)
    file = tmp_path / "ck" / "model.safetensors"
    held = load_file(file)
    wrong(held)
    save_file({n: t.contiguous() for n, t in held.items()}, file, {"format": "pt"})
    code, _, line = runner(monkeypatch, capsys)("onnx", "--checkpoint", tmp_path / "ck", "-o", tmp_path / "out")
    assert (code, said in line, len(line.splitlines())) == (2, True, 1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arch", "stacks", "said"),
    [
        (
            "llama4",
            "blocks",
            "such scales are of [experts, outputs, inputs], and this model's experts are [experts, in",
        ),
        ("qwen3_5_moe", "fbgemm", "such scales are of [experts, inputs, outputs], and this model's experts are [exp"),
    ],
)
def test_stacks_that_lie_the_other_way_are_refused(arch, stacks, said, tmp_path):
    written(tmp_path, arch, stacks)
    with pytest.raises(ExportError) as error:
        exported(tmp_path, "ck")
    assert said in str(error.value)


def test_a_stack_of_other_sizes_is_refused(tmp_path):
    written(tmp_path, "llama4", "fbgemm")
    config = tmp_path / "ck" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_local_experts": 8}))
    with pytest.raises(ExportError, match=r"it is \[4, 64, 128\] once unpacked, config.json makes it \[8, 64, 128\]"):
        exported(tmp_path, "ck")


def test_forms_of_modelopt_whose_groups_are_of_outputs_are_refused(tmp_path):
    written(tmp_path, "llama4", "modelopt")
    file = tmp_path / "ck" / "model.safetensors"
    held = load_file(file)
    held[f"{STACK}_weight_scale"] = torch.full((4, 64, 2), 127, dtype=torch.uint8)
    save_file(held, file, {"format": "pt"})
    with pytest.raises(ExportError, match=r"_weight_scale is U8 \[4, 64, 2\], and experts in one tensor are read in"):
        exported(tmp_path, "ck")
