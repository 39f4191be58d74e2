"""Checkpoints as llm-compressor, ModelOpt and transformers write them mean what these tools say, and run as that."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import native
import numpy as np
import onnx
import pytest
from commands import runner
from decoders import Decoder, prompt, reference, theirs
from tiny_tokenizer import add_tokenizer

from llmexport.export import archs, random_checkpoint
from llmexport.export.checkpoint import open_checkpoint
from llmexport.validate import validate
from llmexport.validate.runtime import open_session

PYTHON = "LLMEXPORT_QUANTISERS"  # the interpreter of an environment with llm-compressor and ModelOpt
SCRIPT = Path(__file__).parents[1] / "quantisers.py"
COMPRESSED = (
    *("w4a16", "w4a16-asymmetric", "w4a16-rows", "w4a16-head", "w4a16-some", "w4a16-tied", "gptq", "w8a16", "w8a8"),
    *("w4a8", "fp8", "fp8-dynamic", "fp8-block", "nvfp4", "nvfp4a16", "mxfp4a16", "mxfp8a16", "mixed"),
)
MODELOPT = (
    *("fp8", "fp8-rows", "fp8-block", "awq", "nvfp4", "nvfp4-fp8", "mxfp4", "mxfp8", "int8", "int8-weights", "mixed"),
)
STACKED = (
    *(f"modelopt-{form}-{arch}" for form in ("fp8", "nvfp4") for arch in ("llama4", "gpt_oss")),
    *("transformers-qwen3_5_moe", "transformers-powers-qwen3_5_moe"),
)
FORMS = (*COMPRESSED, *(f"modelopt-{m}" for m in MODELOPT), "transformers", "transformers-powers", *STACKED)
pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(PYTHON not in os.environ, reason=f"{PYTHON} names no Python with llmcompressor and modelopt"),
]


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tools write, once for all processes of a session."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "quantisers"
    with native.alone(folder.name):
        if not folder.exists():
            made = tmp_path_factory.mktemp("quantisers")
            done = subprocess.run([os.environ[PYTHON], SCRIPT, made], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-2000:]
            made.rename(folder)
    return folder


def test_every_form_that_is_written_is_tested(written: Path) -> None:
    assert {p.parent.name for p in written.glob("*/meant")} == {*FORMS}


@pytest.mark.parametrize("form", FORMS)
def test_the_weights_are_those_that_the_tool_dequantises(form: str, written: Path) -> None:
    found, meant = (open_checkpoint(written / form / kind) for kind in ("ck", "meant"))
    assert found.matrices
    assert meant.names - found.names == set()
    # Exact: a number times its scale, rounded once. ModelOpt divides by a rounded reciprocal of AWQ's scales, and
    # rounds the product with the factor of a column: four roundings of 2^-24 in all.
    allowed = 4 * 2.0**-24 if form == "modelopt-awq" else 0.0
    for name in meant.names:
        wide, expected = found.values(name).astype(np.float32), meant.values(name)
        assert (np.abs(wide - expected) <= allowed * np.abs(expected)).all(), name


@pytest.mark.parametrize("form", FORMS)
def test_the_logits_are_those_of_transformers_on_what_is_meant(
    form: str, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, said = runner(monkeypatch, capsys)("onnx", "--checkpoint", written / form / "ck", "-o", tmp_path / "out")
    assert code == 0, said
    model = reference(written / form / "meant")
    ours = Decoder(tmp_path / "out", "onnxruntime")
    ours.session = open_session(onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False), tmp_path / "out")
    ids, mask = prompt()
    positions, cache = np.maximum(mask.cumsum(-1) - 1, 0), None
    for step in range(2):
        made = theirs(model, ids, mask, positions, cache)
        cache, expected = made.past_key_values, made.logits.numpy()
        ours.check(expected, ours.step(ids, positions, mask), mask.astype(bool) if step == 0 else None)
        ids, positions = expected[:, -1:].argmax(-1), positions[:, -1:] + 1
        mask = np.concatenate((mask, np.ones_like(ids)), 1)


README = Path(__file__).parents[2] / "export" / "README.md"
# The lines that a tool is shown to quantise with, by what it then is told to have made.
LINES = {
    made: lines
    for lines in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    for made in re.findall(r'tokenizer.save_pretrained\("(.+?)"\)', lines)
}


@pytest.mark.parametrize("made", ["Qwen3-8B-AWQ", "Qwen3-8B-GPTQ"])
def test_the_lines_of_the_readme_quantise_what_is_then_exported(
    made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    arch = archs.load("qwen3")
    random_checkpoint.write(arch, tmp_path / "Qwen3-8B", config={"model_type": "qwen3", **arch.tiny, **sizes})
    add_tokenizer(tmp_path / "Qwen3-8B")
    (tmp_path / "texts.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 4)
    done = subprocess.run([os.environ[PYTHON], "-c", LINES[made]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"onnx --checkpoint {made} -o OUT" in README.read_text()
    monkeypatch.chdir(tmp_path)
    code, _, said = runner(monkeypatch, capsys)("onnx", "--checkpoint", made, "-o", "OUT")
    assert code == 0, said
    assert len(open_checkpoint(tmp_path / made).matrices) == 7
    moved = validate(tmp_path / "OUT", rungs=["transformers", "onnxruntime"], reference=tmp_path / "Qwen3-8B")
    assert moved.passed
    assert moved.moved
    assert 0 < moved.moved.kl_mean < 0.2
