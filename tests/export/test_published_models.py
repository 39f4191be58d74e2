"""The configs of 171 published models: each of a claimed family is read, or refused for a reason that is named."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import quantised_checkpoints
import transformers
from tiny_configs import one_line

from llmexport.export import archs, graph_file, random_checkpoint
from llmexport.export.checkpoint import open_checkpoint, read_header
from llmexport.export.errors import ExportError
from llmexport.export.identity import Held, WeightFile, identify
from llmexport.export.keys import QUANTISATION
from llmexport.export.onnx_file import Request, fill, open_model, read_model, read_noted
from llmexport.export.packed.repack import FILE, Repacked
from llmexport.export.spec import Layer
from llmexport.export.weight_layout import write_holes

MODELS: dict[str, dict[str, Any]] = json.loads((Path(__file__).parents[1] / "published_models.json").read_bytes())
TYPES = {
    t for n in archs.names() for t in (*archs.load(n).model_types, *(m.model_type for m in archs.load(n).multimodal))
}
CLAIMED = [n for n, c in MODELS.items() if c.get("model_type") in TYPES]
# How the weights are quantised, as config.json says it.
QUANTISED = {
    "in a public repository: Qwen3-14B-MLX-4bit": "mlx, 4 bits, groups of 64",
    "in a public repository: Qwen3.6 dense, MLX 4 bit": "4 bits, groups of 32",
    "mlx-community/Llama-3.2-1B-Instruct-4bit": "mlx, 4 bits, groups of 64",
    "unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit": "bitsandbytes, nf4, 4 bits",
}
# What their matrices are; of the others two kinds lie beside one another, or there are more than a test has time for.
IN_FEW_BITS = {
    "Qwen/Qwen2.5-7B-Instruct-AWQ": "196 matrices of uint4, groups of 128",
    "Qwen/Qwen3-32B-FP8": "448 matrices of float8_e4m3fn, blocks of 128 x 128",
    "Qwen/Qwen3-32B-FP8-Static-PerTensor": "448 matrices of float8_e4m3fn, one scale each",
    "Qwen/Qwen3-8B-FP8": "252 matrices of float8_e4m3fn, blocks of 128 x 128",
    "RedHatAI/Meta-Llama-3.1-8B-Instruct-FP8-dynamic": "224 matrices of float8_e4m3fn, one scale a row",
    "RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w4a16": "224 matrices of uint4, groups of 128",
}
PACKED = [
    *IN_FEW_BITS,
    *("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "in a public repository: Wizard-Vicuna-30B-GPTQ"),
    *("Qwen/Qwen3-30B-A3B-FP8", "deepseek-ai/DeepSeek-R1", "deepseek-ai/DeepSeek-V3"),
    *("meta-llama/Llama-3.1-405B-Instruct-FP8", "nvidia/Gemma-4-31B-IT-NVFP4", "nvidia/Qwen3.5-122B-A10B-NVFP4"),
    # Experts one by one, where unquantised ones lie in one tensor.
    *("RedHatAI/Llama-4-Scout-17B-16E-Instruct-FP8-dynamic", "meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8"),
    *("nvidia/Qwen3.6-27B-NVFP4", "nvidia/Qwen3.6-35B-A3B-NVFP4"),
]
# Its names are those of the multimodal model, its config that of the text model alone.
REFUSED = {
    "in a public repository: Qwen3.5-25B-REAP (pruned)": "exports ['Qwen3_5MoeForCausalLM']",
    "in a public repository: Devstral-like mistral3, MLX 4 bit": "'mistral4', expected ministral3 or mistral",
    # The type of its text model stands where that of the multimodal one does.
    "mistralai/Ministral-3-3B-2512": "exports ['Ministral3ForCausalLM']",
    # A sentence encoder.
    "BAAI/bge-large-en": "a base model has no head that gives logits, take a BertForMaskedLM",
    # What is known of them: no more than their types.
    "ByteDance-Seed/Seed-OSS-36B-Instruct": "config.json has no 'hidden_size'",
    "CohereForAI/c4ai-command-r-v01": "config.json has no 'hidden_size'",
    "EleutherAI/pythia-1b": "config.json has no 'hidden_size'",
    "Qwen/Qwen3-Next-80B-A3B-Instruct": "config.json has no 'hidden_size'",
    "zai-org/GLM-4.5-Air": "config.json has no 'hidden_size'",
    "HuggingFaceTB/SmolLM3-3B": "config.json has no 'hidden_size'",
    "tencent/Hunyuan-7B-Instruct": "config.json has no 'hidden_size'",
    "google/gemma-4-E2B-it": "config.json has no 'text_config'",
}
READ = [n for n in CLAIMED if n not in QUANTISED and n not in REFUSED and n not in PACKED]
NOTED = {
    "Qwen/Qwen2.5-7B-Instruct-1M": "dual_chunk_attention_config is left out, as transformers does: right up to 262144",
    **dict.fromkeys(
        (n for n in READ if MODELS[n]["model_type"] in ("gemma4", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")),
        "the text model alone is exported",
    ),
    "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B": "attn_factor 0.8782488562869419 is left out, as transformers does",
}
WITH_TOWER = {m.model_type for n in archs.names() for m in archs.load(n).multimodal if m.tower}
# Those whose tower is known; one holds more than weights. How these are quantised does not change what they are of.
SEEING = [
    n for n in CLAIMED if MODELS[n]["model_type"] in WITH_TOWER and MODELS[n].get("vision_config") and "MLX" not in n
]
EXPORTED = ["deepseek-ai/DeepSeek-R1-0528-Qwen3-8B"]


def refusal(name: str) -> str:
    with pytest.raises(ExportError) as error:
        read_model(archs.choose(None, MODELS[name]), MODELS[name])
    return one_line(error.value)


def hollow(name: str, folder: Path) -> Request:
    """The checkpoint of the published shapes, as files of holes."""
    named = archs.choose(None, MODELS[name])
    part = "all" if name in SEEING else "text"
    random_checkpoint.write(named, folder, config=MODELS[name], hollow=True, part=part)
    return Request(named, open_checkpoint(folder), part=part)


def test_the_tables_name_models_of_claimed_families():
    assert len(MODELS) == 171
    assert {*QUANTISED, *PACKED, *REFUSED, *NOTED, *EXPORTED} <= set(CLAIMED)
    assert len(READ) == 111


@pytest.mark.parametrize("name", READ)
def test_a_model_of_a_claimed_family_is_read_as_transformers_reads_it(name):
    config = MODELS[name]
    named = archs.choose(None, config)
    model, notes = read_noted(named, config)
    assert [NOTED[name] in note for note in notes] == [True] * (name in NOTED)
    if named.reference.made_by:
        return
    known = copy.deepcopy(config)
    if (rope := known.get("rope_scaling") or {}).get("type") == "su":
        # What the first release called LongRoPE, which this transformers does not know any more.
        rope["type"] = "longrope"
    theirs = transformers.CONFIG_MAPPING[config["model_type"]](**known).to_dict()
    assert model == read_model(named, theirs)


@pytest.mark.parametrize("name", SEEING)
def test_a_tower_is_read_as_transformers_reads_it(name):
    config = copy.deepcopy({k: v for k, v in MODELS[name].items() if k != "quantization_config"})
    # Which transformers does not know.
    config["text_config"].pop("for_llm_compressor", None)
    theirs = transformers.CONFIG_MAPPING[config["model_type"]](**copy.deepcopy(config)).to_dict()
    named = archs.choose(None, config)
    whole = read_model(named, config, part="all")
    assert [g.name for g in whole.graphs] == ["vision", "decoder"]
    assert whole == read_model(named, theirs, part="all")
    assert read_model(named, config, part="vision") == read_model(named, theirs, part="vision")


@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_model_is_refused_by_what_it_is_quantised(name):
    line = refusal(name)
    assert f"says that the weights are quantised ({QUANTISED[name]}), " in line
    assert "take the unquantised model that it was made from" in line
    assert "remove" not in line


@pytest.mark.parametrize("name", PACKED)
def test_the_config_of_a_quantised_model_is_read_as_that_of_the_unquantised_one(name):
    config = MODELS[name]
    named = archs.choose(None, config)
    assert read_model(named, config) == read_model(named, {k: v for k, v in config.items() if k not in QUANTISATION})


@pytest.mark.parametrize("name", IN_FEW_BITS)
def test_a_quantised_checkpoint_of_the_published_shapes_is_taken(name, tmp_path):
    """Of two layers: what they are made of, and that none of it is read or packed anew but AWQ's numbers."""
    layers = MODELS[name]["num_hidden_layers"]
    checkpoint = open_checkpoint(quantised_checkpoints.hollow(tmp_path, {**MODELS[name], "num_hidden_layers": 2}))
    (out := tmp_path / "out").mkdir()
    export = fill(Request(archs.choose(None, checkpoint.config), checkpoint, dtype="bfloat16"), out)
    number, _, kind = IN_FEW_BITS[name].partition(" ")
    assert export.notes[0].endswith(f": {2 * int(number) // layers} {kind}")
    repacked = [w.file for w in export.weights if w.placed == "repacked"]
    assert bool(repacked) is ("AWQ" in name)


MAVERICK, QWEN = "meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8", "Qwen/Qwen3.5-397B-A17B"
# Experts of several in one tensor as tools write them, of which model, and how many GB are packed anew of it.
STACKED = {
    "blocks": (QWEN, {"quant_method": "fp8", "weight_block_size": [128, 128]}, 0),
    "fbgemm": (MAVERICK, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, 386),
    "modelopt-nvfp4": (MAVERICK, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, 217),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", STACKED)
def test_experts_in_one_tensor_of_a_published_size_are_taken(form, tmp_path, monkeypatch):
    name, said, anew = STACKED[form]
    text = {k: v for k, v in MODELS[name]["text_config"].items() if k != "for_llm_compressor"}
    config = {**MODELS[name], "text_config": text, "quantization_config": said}
    checkpoint = open_checkpoint(quantised_checkpoints.hollow(tmp_path, config))
    (out := tmp_path / "out").mkdir()

    def as_holes(self: Repacked, folder: Path, *_: object, **__: object) -> tuple[WeightFile, Held]:
        write_holes(folder / FILE, (p.tensor for p in self.pieces))
        return identify(folder / FILE, read_header(folder / FILE)[1], "repacked", whole=False)

    monkeypatch.setattr(Repacked, "write", as_holes)
    monkeypatch.setattr(Repacked, "nbytes", 0)
    export = fill(Request(archs.choose(None, config), checkpoint, dtype="bfloat16"), out)
    experts = {m.name for m in checkpoint.matrices.values() if m.experts}
    assert len(experts) == {QWEN: 2 * 60, MAVERICK: 2 * 24}[name]
    assert f"{len(experts)} stacks of experts of float" in export.notes[0]
    assert sum(w.bytes for w in export.weights if w.placed == "repacked") // 10**9 == anew


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_does_not_add_up_is_refused(name):
    assert REFUSED[name] in refusal(name)


@pytest.mark.parametrize("name", [n for n in MODELS if n not in CLAIMED])
def test_a_model_of_another_family_is_refused_by_its_name(name):
    line = refusal(name)
    assert f"model_type {MODELS[name]['model_type']!r}, which no architecture here exports" in line
    assert ("multimodal" in line) == ("vision_config" in MODELS[name] or "text_config" in MODELS[name])


class Checked(Exception):
    """All that is checked before the first trace is."""


@pytest.mark.parametrize("name", READ)
def test_a_checkpoint_of_the_published_shapes_is_taken_up_to_the_first_trace(name, tmp_path, monkeypatch):
    def traced(*_: object) -> object:
        raise Checked

    monkeypatch.setattr(graph_file, "trace_all", traced)
    with pytest.raises(Checked):
        fill(hollow(name, tmp_path / "ck"), tmp_path)


@pytest.mark.parametrize("name", ["google/gemma-2-27b-it", "mistralai/Mixtral-8x22B-v0.1"])
def test_what_a_config_may_ask_for_leaves_room_for_published_models(name, tmp_path):
    _, model, notes = open_model(hollow(name, tmp_path / "ck"))
    assert sum(isinstance(s.block, Layer) for s in model.steps) == MODELS[name]["num_hidden_layers"]
    assert notes == []


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTED)
def test_a_model_exports_from_files_of_holes(name, tmp_path):
    (tmp_path / "out").mkdir()
    record = fill(hollow(name, tmp_path / "ck"), tmp_path / "out")
    assert [NOTED[name] in note for note in record.notes] == [True] * (name in NOTED)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["notes"] == list(record.notes)
