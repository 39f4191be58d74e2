"""Experts that a checkpoint has one by one in few bits: MoeExperts reads them packed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from arch_cases import SLOTS
from engine_folder import of_engine
from native import emulated_library
from packed_exports import by_tensorrt, check_meaning, exported, logits, storages
from quantised_checkpoints import FORMS, write
from safetensors.torch import save_file

from llmexport.export import archs, engine, graph_file
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.spec import Packed, Plain
from llmexport.validate import bound, validate
from llmexport.validate.compare import compare

# A factor of each column, and an order of columns for each expert, are nothing that the op reads.
WIDENED = [n for n in FORMS if "act-order" in n or n == "w4a16-modelopt"]
READ = [n for n in FORMS if n not in WIDENED]
# One of each format of the op, and of what else the graph does to scales.
KINDS = ["awq", "w8a16", "w8a8", "fp8-block", "nvfp4", "mxfp4"]
WIDE = {
    **archs.load("mixtral").tiny,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_local_experts": 8,
}


@pytest.mark.parametrize("form", READ)
def test_experts_compute_with_what_their_numbers_mean(form, tmp_path):
    write(tmp_path, form, "mixtral")
    ours, plain = exported(tmp_path, "ck"), exported(tmp_path, "meant")
    [storage] = storages(ours)
    assert isinstance(storage, Packed)
    check_meaning(form, ours, plain)
    assert "experts" not in " ".join(ours.notes)


@pytest.mark.parametrize("form", WIDENED)
def test_experts_that_the_op_does_not_read_are_widened_and_noted(form, tmp_path):
    write(tmp_path, form, "mixtral")
    ours, plain = exported(tmp_path, "ck"), exported(tmp_path, "meant")
    assert storages(ours) == {Plain()}
    assert ours.notes[1].startswith("36 matrices of experts are dequantised when the model is loaded, ")
    assert compare(logits(plain), logits(ours)).max_abs <= 1e-5


@pytest.mark.parametrize("form", KINDS)
def test_the_file_is_bound_to_each_tensor_and_a_wrong_one_is_found(form, tmp_path):
    write(tmp_path, form, "mixtral")
    export = exported(tmp_path, "ck")
    model = graph_file.load(export, export.graphs[0])
    assert bound.wrong(export, export.graphs[0], model) == {}
    first, second = [t for t in model.graph.initializer if ".experts.0." in t.name][:2]
    first.external_data[1].value = second.external_data[1].value
    [(name, said)] = bound.wrong(export, export.graphs[0], model).items()
    assert (name, "other numbers" in said) == (first.name, True)
    assert bound.reader(export.graphs[0], export.checkpoint(), name).startswith("layers.0")


@pytest.mark.parametrize("form", [KINDS[0], *(pytest.param(n, marks=pytest.mark.slow) for n in KINDS[1:])])
def test_tensorrt_reads_the_same(form, tmp_path):
    write(tmp_path, form, "mixtral")
    ours = exported(tmp_path, "ck")
    difference = compare(logits(ours), by_tensorrt(ours, tmp_path / "work"))
    assert difference.max_abs <= 1e-4
    assert difference.rms_ratio <= 1e-5


@pytest.mark.engine
@pytest.mark.parametrize("form", KINDS)
def test_the_plugin_of_an_engine_keeps_them_packed(form, tmp_path):
    write(tmp_path, form, "mixtral", WIDE)
    ours, plain = exported(tmp_path, "ck"), exported(tmp_path, "meant")
    for export in (ours, plain):
        plan = engine.build(export.folder, plugins=emulated_library()).graphs["model"]
        assert plan.plugins == of_engine(export.graphs[0].ops, plan.plugins)
        assert "NormedMoeExperts" in plan.plugins
    packed, wide = ((e.folder / "model.plan").stat().st_size for e in (ours, plain))
    matrices = ours.checkpoint().matrices.values()
    numbers, bits = sum(m.shape[0] * m.shape[1] for m in matrices), next(m.bits for m in matrices)
    # Scales and zero points may take an eighth of what was saved.
    assert wide - packed >= numbers * (4 - bits / 8) * 7 / 8


@pytest.mark.slow
@pytest.mark.parametrize("form", KINDS)
def test_every_rung_passes(form, tmp_path):
    write(tmp_path, form, "mixtral")
    report = validate(exported(tmp_path, "ck").folder)
    assert [r.status for r in report.rungs[:4]] == ["pass"] * 4


@pytest.mark.parametrize("form", ["fp8-dynamic", "w4a16"])
def test_llama_4_has_experts_one_by_one_where_it_is_quantised(form, tmp_path):
    config = {**archs.load("llama4").tiny, "for_llm_compressor": True, "intermediate_size": 64}
    write(tmp_path, form, "llama4", config)
    export = exported(tmp_path, "ck")
    [storage] = storages(export)
    assert isinstance(storage, Packed)
    assert any(n.endswith("feed_forward.experts.3.up_proj.weight") for n in export.checkpoint().matrices)
    rungs = validate(export.folder).rungs
    assert [(r.key, r.status) for r in rungs[:1]] == [("transformers", "pass")]
    assert [r.status for r in rungs[:4]] == ["pass"] * 4


@pytest.mark.parametrize(
    ("form", "kind"),
    [("awq", {}), ("fp8-block", {"logits": "last"}), ("awq", {"target": "onnxruntime"}), ("awq", {"cache": "static"})],
)
def test_how_far_quantisation_moved_the_logits_is_told(form, kind, tmp_path):
    """In whichever form the export has its experts."""
    write(tmp_path, form, "mixtral")
    slots = {"max_tokens": SLOTS} if "cache" in kind else {}
    folder = exported(tmp_path, "ck", **kind, **slots).folder
    same = validate(folder, rungs=["onnxruntime"], reference=tmp_path / "meant").moved
    assert same
    assert same.kl_max < 1e-8


def test_experts_one_by_one_are_held_against_those_in_one_tensor(tmp_path):
    """A tool that quantises Llama 4 takes its stacks apart, and turns them."""
    config = {**archs.load("llama4").tiny, "for_llm_compressor": True, "intermediate_size": 64}
    write(tmp_path, "fp8-dynamic", "llama4", config)
    meant, whole = open_checkpoint(tmp_path / "meant"), tmp_path / "whole"
    held = {n: torch.tensor(np.array(meant.read(n), np.float32)) for n in meant.names}
    for gate in [n for n in held if n.endswith("experts.0.gate_proj.weight")]:
        start = gate.removesuffix("0.gate_proj.weight")
        each = [[held.pop(f"{start}{e}.{n}_proj.weight") for n in ("gate", "up", "down")] for e in range(4)]
        held[f"{start}gate_up_proj"] = torch.stack([torch.cat((g, u)).T for g, u, _ in each]).contiguous()
        held[f"{start}down_proj"] = torch.stack([d.T for _, _, d in each]).contiguous()
    whole.mkdir()
    save_file(held, whole / "model.safetensors")
    published = {k: v for k, v in meant.config.items() if k != "for_llm_compressor"}
    (whole / "config.json").write_text(json.dumps(published))
    folder = exported(tmp_path, "ck").folder
    same = validate(folder, rungs=["onnxruntime"], reference=whole).moved
    assert same
    assert same.kl_max < 1e-8
