"""`--for` writes what another runtime wants into the export's folder, and says what it cannot run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from arch_cases import ENCODERS, TOWERS
from tiny_configs import one_line, read
from two_graphs import in_two

from llmexport.export import archs, manifest, onnx_file, random_checkpoint
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.errors import ExportError
from llmexport.export.handover import RUNTIMES, hand_over
from llmexport.export.multimodal import text_config
from llmexport.export.onnx_file import read_model

ASKED = {"eos_token_id": [2, 7], "top_k": 5}


def refusal(runtime: str, graphs) -> str:
    with pytest.raises(ExportError) as error:
        hand_over([runtime], graphs, {}, Path("nowhere"))
    return one_line(error.value)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_model_that_generates_nothing_is_refused(runtime: str) -> None:
    why = "which carries nothing from token to token, as a decoder does: leave it out"
    assert refusal(runtime, read(ENCODERS[0].arch).graphs) == f"--for {runtime} cannot run this model, {why}"


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_model_of_several_graphs_is_refused(runtime: str) -> None:
    why = "which is 2 graphs: leave it out"
    assert refusal(runtime, in_two(read("llama")).graphs) == f"--for {runtime} cannot run this model, {why}"


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_model_that_reads_pictures_is_handed_over_as_its_text_model(runtime: str) -> None:
    arch = archs.load(TOWERS[0].arch)
    config = archs.tiny_config(arch, "all")
    said = f"--for {runtime} cannot run a model that reads pictures: pass --part text, or leave it out"
    assert refusal(runtime, read_model(arch, config, part="all").graphs) == said
    text = read_model(arch, config, part="text").graphs
    assert hand_over([runtime], text, text_config(arch, config), Path("nowhere")).files


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_generation_config_that_is_none_is_one_line(runtime: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("[1]")
    with pytest.raises(ExportError, match="holds no JSON object: download it again, or remove it"):
        hand_over([runtime], read("llama").graphs, {}, tmp_path)


@pytest.mark.parametrize(
    ("fields", "odd"), [({"block": "mask"}, "block 'mask'"), ({"target": "tensorrt"}, "target tensorrt")]
)
def test_what_no_other_runtime_runs_is_refused_at_once(fields: dict[str, str], odd: str, tmp_path: Path) -> None:
    random_checkpoint.write(archs.load("llama"), tmp_path / "checkpoint")
    found = open_checkpoint(tmp_path / "checkpoint")
    said = f"^--for genai takes a whole model that ONNX Runtime runs, not {odd}: leave one of them out"
    with pytest.raises(ExportError, match=said):
        onnx_file.Request(archs.load("llama"), found, runtimes=("genai",), **fields)
    with pytest.raises(ExportError, match="runtime is 'vllm': choose of genai"):
        onnx_file.Request(archs.load("llama"), found, runtimes=("vllm",))


@pytest.mark.model
def test_the_files_are_the_exports_own(tmp_path: Path) -> None:
    named = archs.load("llama")
    random_checkpoint.write(named, tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "generation_config.json").write_text(json.dumps(ASKED))
    request = onnx_file.Request(named, open_checkpoint(tmp_path / "checkpoint"), runtimes=("genai", "genai"))
    onnx_file.write(request, tmp_path / "out")
    record = manifest.read(tmp_path / "out")
    assert list(record.companions) == ["config.json", "genai_config.json", "generation_config.json"]
    data = (tmp_path / "out" / "genai_config.json").read_bytes()
    assert record.companions["genai_config.json"] == hashlib.sha256(data).hexdigest()
    said = json.loads(data)
    assert (said["model"]["eos_token_id"], said["search"]["top_k"]) == ([2, 7], 5)
    # It is replaced with the rest.
    onnx_file.write(request, tmp_path / "out", force=True)
