"""Quantised checkpoints are read as published, stay in few bits, and mean what their formats say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest
import torch
from packed_exports import by_tensorrt, check_meaning, exported, logits
from quantised_checkpoints import FORMS, write
from safetensors.torch import load_file, save_file

from llmexport.export import archs, engine, graph_file, onnx_file, random_checkpoint
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.errors import EngineError, ExportError
from llmexport.validate import bound, loading, validate
from llmexport.validate.compare import compare
from llmexport.validate.runtime import SessionOptions

# Wide enough that weights are most of an engine.
WIDE = {
    **archs.load("llama").tiny,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    write(tmp_path, request.param)
    return request.param, tmp_path


def test_numbers_are_what_the_format_says(form):
    _, folder = form
    packed, meant = open_checkpoint(folder / "ck"), open_checkpoint(folder / "meant")
    assert len(packed.matrices) == 21
    for name in packed.matrices:
        assert compare(meant.read(name), packed.values(name)).max_abs <= 1e-7


LAYERS = [f"model.layers.{i}.{m}_proj" for i in range(3) for m in [*(f"self_attn.{n}" for n in "qkvo"), "mlp.down"]]
ROUNDED = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}


@pytest.mark.parametrize(
    "said",
    [
        {"dynamic": {"-:.*head": {}, r"+:.*\.(self_attn|mlp)\.": {"bits": 8}, ".*": {"bits": 4}}},
        {**ROUNDED, "extra_config": {".*(gate|up)_proj": {"bits": 8}, "lm_head": {"bits": 32}}
         | {name: {"bits": 8, "group_size": 32} for name in LAYERS}},
    ],
    ids=["GPTQModel", "AutoRound"],
)  # fmt: skip
def test_modules_may_have_bits_of_their_own(said, tmp_path):
    write(tmp_path, "gptq-8-bits")
    file = tmp_path / "ck" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= {"bits": 4, "group_size": 32, **said}
    file.write_text(json.dumps(config))
    packed, meant = open_checkpoint(tmp_path / "ck"), open_checkpoint(tmp_path / "meant")
    assert len(packed.matrices) == 21
    for name in packed.matrices:
        assert compare(meant.read(name), packed.values(name)).max_abs <= 1e-7


def test_the_graph_computes_with_what_they_mean(form):
    name, folder = form
    ours, plain = exported(folder, "ck"), exported(folder, "meant")
    check_meaning(name, ours, plain)
    assert any(note.startswith("quantised as published: 21 matrices of ") for note in ours.notes)


INTEGERS = [name for name in FORMS if name.startswith(("gptq", "awq", "w4a16", "w8a16"))]


@pytest.mark.parametrize("name", INTEGERS)
def test_onnx_runtime_keeps_integers_packed(name, tmp_path):
    write(tmp_path, name)
    export, options = exported(tmp_path, "ck"), SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    expected, found = logits(export), logits(export, options=options, fused=True)
    nodes = onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph.node
    kinds = [n.op_type for n in nodes]
    assert kinds.count("MatMulNBits") == 21
    assert "DequantizeLinear" not in kinds
    assert compare(expected, found).rms_ratio <= 1e-5


@pytest.mark.parametrize(
    "name", [n if n in ("awq", "nvfp4") else pytest.param(n, marks=pytest.mark.slow) for n in FORMS]
)
def test_tensorrt_reads_the_same_and_keeps_it_packed(name, tmp_path):
    write(tmp_path, name, config=WIDE)
    ours = exported(tmp_path, "ck")
    difference = compare(logits(ours), by_tensorrt(ours, tmp_path / "work"))
    assert difference.max_abs <= 1e-4
    assert difference.rms_ratio <= 1e-5


HALVES = 2 * (4 * 512 * 512 + 3 * 512 * 1024)  # bytes of the matrices in float16
LEAST = {"fp8": (8, 9), "fbgemm": (8, 9), "nvfp4": (10, 0), "mxfp4": (10, 0)}


@pytest.mark.parametrize(
    "name", [n if n in ("w4a16", "fp8-dynamic") else pytest.param(n, marks=pytest.mark.slow) for n in FORMS]
)
def test_an_engine_holds_them_packed(name, tmp_path):
    write(tmp_path, name, config=WIDE)
    ours, plain = exported(tmp_path, "ck", dtype="float16"), exported(tmp_path, "meant", dtype="float16")
    told: list[str] = []
    packed = engine.build(ours.folder, progress=lambda what, done, of: told.append(what))
    whole = engine.build(plain.folder)
    [(small, large)] = zip(packed.graphs.values(), whole.graphs.values(), strict=True)
    bits = open_checkpoint(tmp_path / "ck").matrices.popitem()[1].bits
    # What scales take, of groups of 16 and 32 here, is left to them.
    assert large.bytes - small.bytes > 0.55 * HALVES * (1 - bits / 16)
    least = next((c for start, c in LEAST.items() if name.startswith(start)), (8, 0))
    assert packed.least == least
    assert any(f"for compute capability {least[0]}.{least[1]} and later" in t for t in told) is (least != (8, 0))


@pytest.mark.parametrize("name", ["w4a16-asymmetric", "gptq-act-order"])
def test_weights_cannot_lie_beside_a_plan(name, tmp_path):
    write(tmp_path, name, config=WIDE)
    with pytest.raises(EngineError, match="build the engine with its weights inside"):
        engine.build(exported(tmp_path, "ck").folder, weights="beside")


def test_the_form_of_trtexec_is_that_of_an_engine(tmp_path):
    write(tmp_path, "w8a8")
    with pytest.raises(ExportError, match="export without --target, then run `llmexport engine`"):
        exported(tmp_path, "ck", target="tensorrt")


@pytest.mark.parametrize(
    ("arch", "name"),
    [("mixtral", "awq"), ("deepseek_v3", "fp8-block"), ("qwen2", "gptq-act-order"), ("qwen3_5", "nvfp4-modelopt")],
)
def test_other_architectures_compute_with_what_they_mean(arch, name, tmp_path):
    """Experts one by one, a projection that is absorbed, biases, recurrences."""
    write(tmp_path, name, arch)
    ours, plain = exported(tmp_path, "ck"), exported(tmp_path, "meant")
    difference = compare(logits(plain), logits(ours))
    assert difference.max_abs <= 1e-5
    assert difference.rms_ratio <= 1e-5


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("llama", "gptq-act-order"),
        *(pytest.param(a, n, marks=pytest.mark.slow) for a, n in [("mixtral", "w4a16"), ("deepseek_v3", "fp8-block")]),
    ],
)
def test_validate_passes_every_rung(arch, name, tmp_path):
    write(tmp_path, name, arch)
    report = validate(exported(tmp_path, "ck").folder)
    assert {"transformers", "onnxruntime", "network"} <= {r.key for r in report.rungs if r.status == "pass"}
    assert report.passed


def test_a_tensor_that_is_not_the_checkpoints_is_told(tmp_path):
    write(tmp_path, "gptq-asymmetric")
    export = exported(tmp_path, "ck")
    [graph] = export.graphs
    model = graph_file.load(export, graph)
    assert bound.wrong(export, graph, model) == {}
    for tensor in model.graph.initializer:
        if tensor.name.endswith("layers.0.self_attn.q_proj.weight/numbers"):
            place = next(e for e in tensor.external_data if e.key == "offset")
            place.value = str(int(place.value) + 16)
    [(name, said)] = bound.wrong(export, graph, model).items()
    assert name.endswith("q_proj.weight/numbers")
    assert "where other numbers lie" in said


def test_how_far_quantisation_moved_the_logits_is_told(tmp_path):
    write(tmp_path, "w4a16")
    folder = exported(tmp_path, "ck").folder
    report = validate(folder, rungs=["onnxruntime"], reference=tmp_path / "plain")
    # In 4 bits more than nothing, and most tokens are the same.
    assert report.moved
    assert 1e-5 < report.moved.kl_mean < 0.2
    assert 0.5 < report.moved.top1 < 1
    assert "moved by quantisation" in (folder / "report.html").read_text()
    same = validate(folder, rungs=["onnxruntime"], reference=tmp_path / "meant").moved
    assert same
    assert same.kl_max < 1e-8


@pytest.mark.parametrize("wrong", ["another model", "another depth", "not quantised", "quantised itself"])
def test_a_reference_of_another_model_is_refused(wrong, tmp_path):
    write(tmp_path, "w4a16")
    config = {**archs.load("llama").tiny} | ({"num_hidden_layers": 2} if wrong == "another depth" else {})
    random_checkpoint.write(
        archs.load("qwen2" if wrong == "another model" else "llama"),
        tmp_path / "other",
        config=None if wrong == "another model" else config,
    )
    folder = exported(tmp_path, "meant" if wrong == "not quantised" else "ck").folder
    with pytest.raises(ExportError, match="--reference: "):
        validate(folder, rungs=["onnxruntime"], reference=tmp_path / ("ck" if wrong == "quantised itself" else "other"))


def test_what_is_left_out_is_noted(tmp_path):
    """Of a bias of zeros, as AutoGPTQ writes one of every matrix, nothing is left out."""
    write(tmp_path, "fp8-modelopt")
    attention, file = "model.layers.0.self_attn", tmp_path / "ck" / "model.safetensors"
    scales = {f"{attention}.k_proj.k_scale": torch.tensor(0.5), f"{attention}.kv_scale": torch.tensor(0.5)}
    aside = {f"{attention}.q_proj.input_zero_point": torch.tensor(0.0)}
    held, bias = load_file(file) | scales | aside, f"{attention}.q_proj.bias"
    save_file(held | {bias: torch.full((64,), 1e-3)}, file)
    with pytest.raises(ExportError, match=rf"1 tensors that this architecture does not use: {bias}"):
        exported(tmp_path, "ck")
    save_file(held | {bias: torch.zeros(64)}, file)
    export, plain = exported(tmp_path, "ck"), exported(tmp_path, "meant")
    assert export.notes == (
        "quantised as published: 21 matrices of float8_e4m3fn, one scale each",
        "activations are not quantised: what the checkpoint says of their scales is left out",
        f"the cache is not quantised, its scales are left out: {', '.join(scales)}",
        "ONNX Runtime has no product of these types on a CPU and widens them at each call: set the session option "
        '"session.disable_quant_qdq" to "1", so that it does when it loads the model',
    )
    assert not {bias, *scales} & loading._tensors(export).keys()
    assert compare(logits(plain), logits(export)).max_abs <= 1e-5


@pytest.mark.parametrize(
    ("form", "weights"), [("gptq", "link"), ("fp8-block", "copy")], ids=["what is packed anew", "what is copied"]
)
def test_a_disk_that_is_too_small_is_told_before_anything_is_traced(form, weights, tmp_path, monkeypatch):
    write(tmp_path, form)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(onnx_file, "build", lambda *_: pytest.fail("something was traced"))
    request = onnx_file.Request(archs.load("llama"), open_checkpoint(tmp_path / "ck"), weights=weights)
    with pytest.raises(ExportError, match=r"cannot write .* GB of weights to .*: free space"):
        onnx_file.write(request, tmp_path / "out", force=False)
    assert not (tmp_path / "out").exists()
