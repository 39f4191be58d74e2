"""Quantising on export, the head too: what is written of it, and what a decoded token then runs."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from commands import runner
from decoders import Decoder, prompt
from rounded import EXACT, export, nearest, stored, tensors
from tiny_configs import one_line

from llmexport.export import archs, random_checkpoint
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.errors import ExportError
from llmexport.validate import validate
from llmexport.validate.compare import compare

TIED = {"tie_word_embeddings": True}


@pytest.mark.model
@pytest.mark.parametrize(
    ("arch", "kind", "changes"), [("llama", "int4", {}), ("llama", "fp8", TIED), ("gemma3_text", "int8", {})]
)
def test_a_head_is_rounded_if_that_is_asked_and_words_are_not(arch, kind, changes, tmp_path):
    named = archs.load(arch)
    config = {"model_type": named.model_types[0], **named.tiny, **changes}
    random_checkpoint.write(named, tmp_path / "ck", config=config)
    made = export(tmp_path / "ck", tmp_path / "out", kind, quantize_head=True)
    again = export(tmp_path / "out", tmp_path / "again", None)
    assert (tmp_path / "again/model.onnx").read_bytes() == (tmp_path / "out/model.onnx").read_bytes()
    assert again.graphs == made.graphs
    plain, held = tensors(tmp_path / "ck"), tensors(tmp_path / "out")
    table = plain["model.embed_tokens.weight"]
    np.testing.assert_array_equal(held["model.embed_tokens.weight"], table)
    head = plain.get("lm_head.weight", table)
    assert ("lm_head.weight" in plain) is (arch == "llama" and not changes)
    numbers, scales = nearest(head, kind, head.shape[1])
    np.testing.assert_array_equal(held["lm_head.weight_scale"], scales)
    np.testing.assert_array_equal(stored(held, "lm_head", kind), numbers)
    assert made.config["tie_word_embeddings"] is False
    assert made.config["quantization_config"]["ignore"] == ["model.embed_tokens"]
    ours, theirs = (Decoder(tmp_path / "out", runner) for runner in ("torch", "onnx"))
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    theirs.session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx", options)
    ids, mask = prompt()
    positions = np.maximum(mask.cumsum(-1) - 1, 0)
    expected, found = (d.step(ids, positions, mask) for d in (ours, theirs))
    difference = compare(expected, found, mask != 0)
    assert difference.scale > 0.5
    assert difference.excess(EXACT) <= 1, difference
    moved = validate(tmp_path / "out", rungs=["onnxruntime"], reference=tmp_path / "ck").moved
    assert moved
    assert 1e-5 < moved.kl_mean < 0.2


@pytest.mark.model
@pytest.mark.parametrize(
    ("arch", "changes", "said"),
    [
        ("t5", TIED, "the head of t5 is its table of words alone"),
        ("llama", {"hidden_size": 48, "intermediate_size": 64}, "llama has no head here that can be rounded so"),
    ],
)
def test_a_head_that_cannot_be_rounded_is_refused(arch, changes, said, tmp_path):
    named = archs.load(arch)
    config = {"model_type": named.model_types[0], **named.tiny, **changes}
    random_checkpoint.write(named, tmp_path / "ck", config=config, hollow=True)
    with pytest.raises(ExportError, match=f"^--quantize-head: {said}: leave it out") as error:
        export(tmp_path / "ck", tmp_path / "out", "int4", quantize_head=True)
    one_line(error.value)


@pytest.mark.model
def test_a_step_of_int4_is_made_of_products_in_few_bits_and_few_other_nodes(tmp_path):
    """What a decoded token costs on a CPU: an unrounded head, a matrix turned or widened at each step, and bodies of
    small operators made it twice as slow as onnxruntime-genai's (tests/bench/bench_int4.py)."""
    random_checkpoint.write(archs.load("llama"), tmp_path / "ck")
    made = export(tmp_path / "ck", tmp_path / "out", "int4", quantize_head=True)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(tmp_path / "out/model.onnx", options)
    nodes = onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph.node
    kinds = Counter(n.op_type for n in nodes)
    layers = made.config["num_hidden_layers"]
    assert kinds["MatMulNBits"] == 7 * layers + 1
    assert {a.i for n in nodes if n.op_type == "MatMulNBits" for a in n.attribute if a.name == "accuracy_level"} == {4}
    assert not kinds.keys() & {"MatMul", "Gemm", "DequantizeLinear", "Pow", "ReduceMean", "Split"}
    in_layers = Counter(n.op_type for n in nodes if n.name.startswith("layers.1/"))
    assert in_layers["Transpose"] == 4  # q, k, v and what attention makes; no weight
    assert in_layers.total() <= 29


@pytest.mark.engine
def test_deploy_quantises_on_the_way(monkeypatch, capsys, tmp_path):
    rounds = ("--quantize", "int4", "--group-size", "32", "--quantize-head")
    code, out, err = runner(monkeypatch, capsys)("deploy", "--arch", "gemma", *rounds, "-o", tmp_path / "out")
    assert code == 0, err
    assert "quantised" in out
    held = open_checkpoint(tmp_path / "out")
    assert len(held.matrices) == 22
    assert {m.scales.block for m in held.matrices.values()} == {(1, 32)}
    assert json.loads((tmp_path / "out/report.json").read_text())["passed"]
    assert (tmp_path / "out/model.plan").stat().st_size
