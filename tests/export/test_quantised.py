"""Quantised checkpoints are refused by what they are, as the config says it or as the tensors show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_configs import one_line

from llmexport.export import archs, weights
from llmexport.export.checkpoint import ITEMSIZE, open_checkpoint
from llmexport.export.errors import ExportError
from llmexport.export.onnx_file import Request, fill
from llmexport.export.quantised import describe

Tensors = dict[str, tuple[str, list[int]]]
M, N = 64, 64  # rows and columns of the matrix that is stored otherwise
NAME = "model.layers.0.self_attn.q_proj"
# In place of NAME.weight: what the published formats store, and what is said of it.
LAYOUTS: dict[str, tuple[dict[str, tuple[str, list[int]]], str]] = {
    "FP8 in blocks": (
        {".weight": ("F8_E4M3", [M, N]), ".weight_scale_inv": ("F32", [1, 1])},
        "a scale for each block, stored as F8_E4M3",
    ),
    "FP8 of ModelOpt": (
        {".weight": ("F8_E4M3", [M, N]), ".weight_scale": ("F32", []), ".input_scale": ("F32", [])},
        "a scale beside each matrix, stored as F8_E4M3",
    ),
    "FP8 of compressed-tensors": (
        {".weight": ("F8_E4M3", [M, N]), ".weight_scale": ("BF16", [M, 1])},
        "a scale beside each matrix, stored as F8_E4M3",
    ),
    "int8 of compressed-tensors": (
        {".weight": ("I8", [M, N]), ".weight_scale": ("BF16", [M, 1])},
        "a scale beside each matrix, stored as I8",
    ),
    "NVFP4 of ModelOpt": (
        {
            ".weight": ("U8", [M, N // 2]),
            ".weight_scale": ("F8_E4M3", [M, N // 16]),
            ".weight_scale_2": ("F32", []),
            ".input_scale": ("F32", []),
        },
        "ModelOpt, 4 bits, stored as U8",
    ),
    "NVFP4 of compressed-tensors": (
        {
            ".weight_packed": ("U8", [M, N // 2]),
            ".weight_scale": ("F8_E4M3", [M, N // 16]),
            ".weight_global_scale": ("F32", [1]),
        },
        "compressed-tensors, NVFP4, stored as U8",
    ),
    "w4a16 of compressed-tensors": (
        {
            ".weight_packed": ("I32", [M, N // 8]),
            ".weight_scale": ("BF16", [M, 1]),
            ".weight_shape": ("I64", [2]),
        },
        "compressed-tensors, packed integers, stored as I32",
    ),
    "GPTQ": (
        {
            ".qweight": ("I32", [N // 8, M]),
            ".qzeros": ("I32", [1, M // 8]),
            ".scales": ("F16", [1, M]),
            ".g_idx": ("I32", [N]),
        },
        "GPTQ, stored as I32",
    ),
    "AWQ": (
        {".qweight": ("I32", [N, M // 8]), ".qzeros": ("I32", [1, M // 8]), ".scales": ("F16", [1, M])},
        "AWQ or GPTQ, stored as I32",
    ),
    "bitsandbytes nf4": (
        {
            ".weight": ("U8", [M * N // 2, 1]),
            ".weight.absmax": ("U8", [M * N // 64]),
            ".weight.quant_map": ("F32", [16]),
            ".weight.quant_state.bitsandbytes__nf4": ("U8", [90]),
        },
        "bitsandbytes, 4 bits, stored as U8",
    ),
    "bitsandbytes int8": (
        {".weight": ("I8", [M, N]), ".SCB": ("F32", [M]), ".weight_format": ("U8", [])},
        "bitsandbytes, 8 bits, stored as I8",
    ),
    "MLX": (
        {".weight": ("U32", [M, N // 8]), ".scales": ("BF16", [M, 1]), ".biases": ("BF16", [M, 1])},
        "MLX, stored as U32",
    ),
}


def write(folder: Path, change: dict[str, tuple[str, list[int]]], arch: str = "llama", name: str = NAME) -> Path:
    """A checkpoint of holes of the tiny config, with `change` in place of one weight."""
    from llmexport.export import random_checkpoint

    random_checkpoint.write(archs.load(arch), folder / "plain", hollow=True)
    plain = open_checkpoint(folder / "plain")
    tensors: Tensors = {t.name: (t.dtype, list(t.shape)) for t in plain.tensors.values() if t.name != f"{name}.weight"}
    tensors |= {name + end: kind for end, kind in change.items()}
    header, end = {}, 0
    for key, (dtype, shape) in tensors.items():
        start, size = end, ITEMSIZE[dtype]
        for n in shape:
            size *= n
        end = start + size
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    made = folder / "ck"
    made.mkdir()
    (made / "config.json").write_text(json.dumps(plain.config))
    with (made / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return made


def refusal(folder: Path, block: str | None = None) -> str:
    checkpoint = open_checkpoint(folder)
    (out := folder.parent / "out").mkdir(exist_ok=True)
    with pytest.raises(ExportError) as error:
        fill(Request(archs.choose(None, checkpoint.config), checkpoint, block=block), out)
    return one_line(error.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_told_by_its_tensors_where_the_config_says_nothing(layout, tmp_path):
    change, words = LAYOUTS[layout]
    line = refusal(write(tmp_path, change))
    assert f"the checkpoint's weights are quantised ({words}), as '{NAME}." in line
    assert "take the unquantised model that it was made from" in line
    assert "remove" not in line
    assert "every shard" not in line


def test_one_block_alone_is_refused_by_the_same_line(tmp_path):
    change, words = LAYOUTS["GPTQ"]
    folder = write(tmp_path, change)
    assert f"quantised ({words})" in refusal(folder, "attention")


@pytest.mark.parametrize(
    ("file", "data", "words"),
    [
        (
            "hf_quant_config.json",
            {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None}},
            "hf_quant_config.json: modelopt, FP8",
        ),
        (
            "quantize_config.json",
            {"bits": 4, "group_size": -1, "desc_act": True},
            "quantize_config.json: 4 bits, one group",
        ),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 128}, "quant_config.json: 4 bits, groups of 128"),
    ],
)
def test_what_the_tool_wrote_beside_is_said_too(file, data, words, tmp_path):
    folder = write(tmp_path, LAYOUTS["FP8 of ModelOpt"][0])
    (folder / file).write_text(json.dumps(data))
    assert words in refusal(folder)
    for broken in ("{", "[]", "[" * 100_000):
        (folder / file).write_text(broken)
        assert "stored as F8_E4M3)" in refusal(folder)


def test_quantised_experts_one_by_one_in_place_of_a_stack_are_told(tmp_path):
    stack = "model.layers.1.feed_forward.experts.gate_up_proj"
    one = {"experts.0.gate_proj.weight": ("F8_E4M3", [48, 64]), "experts.0.gate_proj.weight_scale": ("BF16", [48, 1])}
    folder = write(tmp_path, one, "llama4", stack.removesuffix("experts.gate_up_proj"))
    checkpoint = open_checkpoint(folder)
    del checkpoint.tensors[stack]
    with pytest.raises(ExportError, match=r"quantised \(a scale beside each matrix, stored as F8_E4M3\)"):
        weights.check({stack: weights.Parameter(stack, (4, 64, 96))}, checkpoint, (), whole=False)


def test_a_missing_tensor_of_a_plain_checkpoint_is_called_missing(tmp_path):
    line = refusal(write(tmp_path, {}))
    assert line.startswith(f"checkpoint lacks 1 tensors that its config.json asks for: {NAME}.weight. ")
    assert "quantised" not in line


def test_a_float_that_is_no_weight_is_not_called_quantised(tmp_path):
    assert "is stored as F64; F32, F16, BF16 can be exported here" in refusal(
        write(tmp_path, {".weight": ("F64", [M, N])})
    )


def test_scales_of_a_quantised_cache_are_named_as_tensors_that_nothing_reads(tmp_path):
    change = {".weight": ("BF16", [M, N]), ".k_scale": ("F32", [])}
    assert f"does not use: {NAME}.k_scale" in refusal(write(tmp_path, change))


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": None}, "fp8, e4m3"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, 8 bits"),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": -1, "checkpoint_format": "gptq_v2"},
            "gptq, gptq_v2, 4 bits, one group",
        ),
        ({"bits": 4, "group_size": 64}, "mlx, 4 bits, groups of 64"),
        ({}, "by what is not said: {}"),
        ("awq", "'awq'"),
        ({"quant_method": "a\nb\x1b[31m"}, "'a\\nb\\x1b[31m'"),
        ({"quant_method": ["awq"], "bits": {}, "config_groups": {"x": 1}, "producer": 7}, "['awq']"),
    ],
)
def test_a_config_is_described_in_words(found: Any, words: str) -> None:
    assert describe(found) == words


def test_mxfp4_that_the_config_does_not_tell_of_is_named(tmp_path):
    name = "model.layers.0.mlp.experts.gate_up_proj"
    folder = write(tmp_path, {"_blocks": ("U8", [4, 64, 2, 16]), "_scales": ("U8", [4, 64, 2])}, "gpt_oss", name)
    held = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in held
    checkpoint = open_checkpoint(folder)
    del checkpoint.tensors[name]
    with pytest.raises(ExportError, match="experts are in MXFP4, of which"):
        weights.check({name: weights.Parameter(name, (4, 64, 64))}, checkpoint, (), whole=False)
