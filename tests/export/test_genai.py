"""`genai_config.json` says what onnxruntime-genai 0.18 reads; where it is installed, its tokens are transformers'."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
import transformers
from arch_cases import FIRST, KEYED, LATENTS, Case
from other_runtimes import GENAI, asked
from tiny_configs import read

from llmexport.export import archs, genai, onnx_file
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.errors import ExportError
from llmexport.export.onnx_file import read_model
from llmexport.export.spec import Model
from llmexport.export.static import StaticCache

PYTHON = "LLMEXPORT_GENAI_PYTHON"  # the interpreter of an environment with onnxruntime-genai
PADDED = "onnxruntime-genai pads a batch on the right, which this model's graph does not take"
ENDS = {"eos_token_id": 2}


def written(model: Model, config: dict | None = None, generation: dict | None = None) -> tuple[dict, list[str]]:
    asked = {"max_position_embeddings": 512, **ENDS, **(config or {})}
    files, notes = genai.files(model.graphs[0], asked, generation or {})
    assert list(files) == ["genai_config.json"]
    return files["genai_config.json"], notes


def test_the_file_of_a_llama() -> None:
    generation = {"eos_token_id": [2, 7], "pad_token_id": 0, "do_sample": True, "top_p": 0.9, "max_length": 9}
    assert written(read("llama"), {"bos_token_id": 1}, generation) == (
        {
            "model": {
                "type": "decoder",
                "vocab_size": 256,
                "context_length": 512,
                "bos_token_id": 1,
                "eos_token_id": [2, 7],
                "pad_token_id": 0,
                "decoder": {
                    "filename": "model.onnx",
                    "head_size": 16,
                    "hidden_size": 64,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                    "num_hidden_layers": 3,
                    "session_options": {"provider_options": []},
                    "inputs": {
                        "input_ids": "input_ids",
                        "attention_mask": "attention_mask",
                        "position_ids": "position_ids",
                        "past_key_names": "past_key_values.%d.key",
                        "past_value_names": "past_key_values.%d.value",
                    },
                    "outputs": {
                        "logits": "logits",
                        "present_key_names": "present.%d.key",
                        "present_value_names": "present.%d.value",
                    },
                },
            },
            "search": {"do_sample": True, "top_p": 0.9, "max_length": 512, "past_present_share_buffer": False},
        },
        [],
    )


OTHERS = (*LATENTS, "chatglm_6b", "gemma4_text", "openelm", "yuan")  # of sizes or states that its file has no place for


@pytest.mark.parametrize("case", [c for c in KEYED if c.arch not in OTHERS], ids=str)
def test_its_names_and_sizes_are_those_of_the_graph(case: Case) -> None:
    model = read(case.arch, **case.changes)
    decoder = written(model)[0]["model"]["decoder"]
    [graph] = model.graphs
    ports = {p.name: p for p in graph.assembly.inputs}
    fixed = {name for key, name in decoder["inputs"].items() if not key.startswith("past_")}
    layers = range(decoder["num_hidden_layers"])
    keys, values = ({decoder["inputs"][f"past_{kind}_names"] % i for i in layers} for kind in ("key", "value"))
    # A layer without keys and values has states that the runtime finds by names of its own.
    states = {pattern % i for pattern in genai.STATES for i in layers if f"past_key_values.{i}.key" not in ports}
    assert fixed | (keys & ports.keys()) | (values & ports.keys()) | states == ports.keys()
    shapes = {ports[n].shape for n in keys | values if n in ports}
    assert shapes == {("batch", decoder["num_key_value_heads"], "past", decoder["head_size"])}
    outputs = {p.name for p in graph.assembly.outputs}
    kinds = {"key": keys, "value": values}
    for kind, names in kinds.items():
        present = {decoder["outputs"][f"present_{kind}_names"] % i for i in layers}
        assert {graph.carried[n] for n in names if n in ports} == present & outputs


def test_mrope_has_a_runner_of_its_own_which_finds_no_image_in_a_text() -> None:
    file, notes = written(read("qwen3_5_moe"), {"pad_token_id": 3})
    assert file["model"]["type"] == "qwen3_5_moe_text"
    ids = ("pad_token_id", "image_token_id", "video_token_id", "vision_start_token_id")
    assert [file["model"][key] for key in ids] == [-1] * 4
    assert [n.partition(":")[0] for n in notes] == [PADDED]


def test_who_may_not_be_padded_on_the_right_is_noted() -> None:
    taken = [c for c in FIRST if c in KEYED and c.arch not in OTHERS]
    noted = {c.arch for c in taken if any(PADDED in n for n in written(read(c.arch))[1])}
    assert noted == {"gpt_oss", "gemma2", "grok", "qwen3_5", "qwen3_5_moe"}


@pytest.mark.parametrize(
    ("arch", "said"),
    [
        ("gemma4_text", "whose layers keep keys and values of different shapes"),
        ("openelm", "whose layers keep keys and values of different shapes"),
        ("yuan", "which carries past_key_values.%d.filter_half"),
        ("chatglm_6b", "which carries past_key_values.passage.blanks"),
    ],
)
def test_what_its_file_has_no_place_for_is_refused(arch: str, said: str) -> None:
    with pytest.raises(ExportError, match=said):
        written(read(arch))


@pytest.mark.parametrize("arch", LATENTS)
def test_a_cache_of_latents_is_refused(arch: str) -> None:
    with pytest.raises(ExportError, match="which keeps a latent of each token and no values of the shape of keys"):
        written(read(arch))


def test_a_static_cache_is_one_buffer_of_the_longest_text() -> None:
    file, notes = written(read_model(archs.load("llama"), archs.load("llama").tiny, StaticCache(64)))
    assert file["search"] == {"do_sample": False, "max_length": 64, "past_present_share_buffer": True}
    assert [n.partition(":")[0] for n in notes] == [PADDED]


def test_a_static_cache_that_keeps_a_window_is_refused() -> None:
    with pytest.raises(ExportError, match="whose static cache keeps the last tokens alone in some layers"):
        written(read_model(archs.load("mistral"), archs.load("mistral").tiny, StaticCache(64)))
    whole, _ = written(read_model(archs.load("mistral"), archs.load("mistral").tiny, StaticCache(64, math.inf)))
    assert whole["search"] == {"do_sample": False, "max_length": 64, "past_present_share_buffer": True}


def test_a_model_that_keeps_no_keys_is_refused() -> None:
    with pytest.raises(ExportError, match="which keeps no keys"):
        written(read("rwkv"))


def test_what_no_config_says_is_noted() -> None:
    files, notes = genai.files(read("llama").graphs[0], {"eos_token_id": 256}, {})
    assert notes == [
        "no config says eos_token_id, without which onnxruntime-genai stops: write it into genai_config.json",
        "config.json says no max_position_embeddings: genai_config.json says 4096, as context_length",
    ]
    assert not files["genai_config.json"]["model"].keys() & {"bos_token_id", "eos_token_id", "pad_token_id"}


def test_a_batch_is_padded_by_what_ends_a_text_where_nothing_pads() -> None:
    assert written(read("llama"), {"eos_token_id": [5, 6]})[0]["model"]["pad_token_id"] == 5


@pytest.mark.model
@pytest.mark.skipif(PYTHON not in os.environ, reason=f"{PYTHON} names no Python with onnxruntime-genai")
@pytest.mark.parametrize("target", ["portable", "onnxruntime"])
@pytest.mark.parametrize(
    ("arch", "slots"),
    [
        *((arch, None) for arch in ("llama", "gpt_oss", "llama4", "qwen3_5_moe")),
        *((arch, 64) for arch in ("llama", "gpt_oss", "llama4", "mistral")),
    ],
)
def test_the_tokens_are_those_of_transformers(
    arch: str, slots: int | None, target: str, tiny_checkpoint, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(arch)
    checkpoint = open_checkpoint(folder)
    request = onnx_file.Request(
        archs.choose(None, checkpoint.config),
        checkpoint,
        runtimes=("genai",),
        target=target,
        cache="static" if slots else "dynamic",
        max_tokens=slots,
        window_slots="all" if slots else "last",
    )
    onnx_file.write(request, tmp_path / "out")
    config = tmp_path / "out" / genai.FILE
    said = json.loads(config.read_text())
    config.write_text(json.dumps({**said, "model": said["model"] | ENDS}))
    # Token 0, and the one that ends a text, are tokens like others.
    prompts = [[5, 0, 9, 2, 77, 0, 8, 30, 31, 32, 33, 34], [7, 6, 5, 4]]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    wanted = []
    for ids in (torch.tensor([p]) for p in prompts):
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, min_new_tokens=20, **ENDS
        )
        wanted.append(made[0, ids.shape[1] :].tolist())
    assert asked(os.environ[PYTHON], GENAI, tmp_path / "out", prompts, 20) == wanted
