"""Quantised checkpoints that are not read are refused by what they are, as the config or the tensors show it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_configs import one_line

from llmexport.export import archs, weights
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.errors import ExportError
from llmexport.export.onnx_file import Request, fill
from llmexport.export.quantised import describe
from llmexport.export.weight_layout import unplaced, write_holes
from llmexport.plugins.dtypes import BY_SAFETENSORS

Tensors = dict[str, tuple[str, list[int]]]
Changes = dict[str, tuple[str, list[int]] | None]  # None where a tensor is left out
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


def write(
    folder: Path,
    change: dict[str, tuple[str, list[int]]],
    arch: str = "llama",
    name: str = NAME,
    said: dict[str, Any] | None = None,
) -> Path:
    """A checkpoint of holes of the tiny config, with `change` in place of one weight, and what is `said` of it."""
    from llmexport.export import random_checkpoint

    random_checkpoint.write(archs.load(arch), folder / "plain", hollow=True)
    plain = open_checkpoint(folder / "plain")
    tensors: Tensors = {t.name: (t.dtype, list(t.shape)) for t in plain.tensors.values() if t.name != f"{name}.weight"}
    tensors |= {name + end: kind for end, kind in change.items()}
    made = folder / "ck"
    made.mkdir()
    (made / "config.json").write_text(json.dumps(plain.config | ({"quantization_config": said} if said else {})))
    held = [unplaced(key, BY_SAFETENSORS[dtype], tuple(shape)) for key, (dtype, shape) in tensors.items()]
    write_holes(made / "model.safetensors", held)
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
    ("file", "data", "layout", "words"),
    [
        (
            "hf_quant_config.json",
            {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None}},
            "FP8 of ModelOpt",
            "hf_quant_config.json: modelopt, FP8",
        ),
        ("quantize_config.json", {"bits": 4, "group_size": -1, "sym": False}, "GPTQ", "4 bits, one group"),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 64}, "AWQ", "4 bits, groups of 64"),
    ],
)
def test_what_the_tool_wrote_beside_is_read_where_the_config_says_nothing(file, data, layout, words, tmp_path):
    change, told = LAYOUTS[layout]
    folder = write(tmp_path, change)
    (folder / file).write_text(json.dumps(data))
    assert open_checkpoint(folder).matrices.keys() == {f"{NAME}.weight"}
    for broken in ("{", "[]", "[" * 100_000):
        (folder / file).write_text(broken)
        assert f"quantised ({told})" in refusal(folder)


def test_an_unknown_method_that_a_tool_wrote_beside_is_said_too(tmp_path):
    folder = write(tmp_path, LAYOUTS["bitsandbytes int8"][0])
    (folder / "quantize_config.json").write_text(json.dumps({"quant_method": "hqq", "bits": 4, "group_size": 64}))
    assert "stored as I8, quantize_config.json: hqq, 4 bits, groups of 64)" in refusal(folder)


@pytest.mark.parametrize("method", ["bitsandbytes", "hqq", "quanto", "mlx", "auto-round"])
def test_a_method_that_is_not_read_is_refused_by_its_name(method, tmp_path):
    line = refusal(write(tmp_path, LAYOUTS["GPTQ"][0], said={"quant_method": method, "bits": 4, "group_size": 64}))
    assert line.startswith(
        f"config.json: quantization_config says that the weights are quantised ({method}, 4 bits, groups of 64)"
    )
    assert "take the unquantised model" in line


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [64, 64]}
INTS = {"num_bits": 4, "strategy": "channel", "symmetric": True}


def compressed(kind: str, targets: tuple[str, ...] = ("Linear",), ignore: tuple[str, ...] = (), **weights: Any) -> dict:
    group = {"targets": list(targets), "weights": weights}
    said = {"quant_method": "compressed-tensors", "format": kind, "ignore": list(ignore)}
    return said | {"config_groups": {"group_0": group}}


def modelopt(algorithm: object) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algorithm}


FITTING = {
    "FP8 in blocks": FP8,
    "FP8 of ModelOpt": modelopt("FP8"),
    "FP8 of compressed-tensors": compressed("float-quantized", num_bits=8, strategy="channel"),
    "int8 of compressed-tensors": compressed("int-quantized", num_bits=8, strategy="channel"),
    "NVFP4 of ModelOpt": modelopt("NVFP4"),
    "NVFP4 of compressed-tensors": compressed(
        "nvfp4-pack-quantized", num_bits=4, strategy="tensor_group", group_size=16
    ),
    "w4a16 of compressed-tensors": compressed("pack-quantized", **INTS),
    "GPTQ": GPTQ,
    "AWQ": AWQ,
}


@pytest.mark.parametrize("layout", FITTING)
def test_a_layout_that_its_config_tells_of_is_read(layout, tmp_path):
    checkpoint = open_checkpoint(write(tmp_path, LAYOUTS[layout][0], said=FITTING[layout]))
    assert [(n, m.shape) for n, m in checkpoint.matrices.items()] == [(f"{NAME}.weight", (M, N))]


# A layout, what is changed of its tensors, what config.json says of it, and what is wrong.
CONTRADICTIONS: list[tuple[str, Changes, dict[str, Any], str]] = [
    ("FP8 of ModelOpt", {".weight": None}, modelopt("FP8"), "it lacks .weight:"),
    ("FP8 of ModelOpt", {}, GPTQ, "it lacks .qweight:"),
    ("GPTQ", {}, modelopt("FP8"), "it lacks .weight:"),
    (
        "int8 of compressed-tensors",
        {},
        FITTING["FP8 of compressed-tensors"],
        ".weight is I8, which float-quantized has not",
    ),
    (
        "NVFP4 of compressed-tensors",
        {},
        compressed("pack-quantized", **INTS),
        ".weight_packed is U8, which pack-quantized has not",
    ),
    (
        "FP8 in blocks",
        {},
        {**FP8, "weight_block_size": [32, 64]},
        ".weight_scale_inv is [1, 1], blocks of 32 x 64 make it [2, 1]",
    ),
    (
        "FP8 of ModelOpt",
        {".weight_scale": ("F32", [3])},
        modelopt("FP8"),
        ".weight_scale is [3], blocks of 128 x 128 make it [1, 1]",
    ),
    (
        "FP8 of ModelOpt",
        {".weight_scale": ("I32", [])},
        modelopt("FP8"),
        ".weight_scale is I32, which modelopt has not",
    ),
    ("FP8 of ModelOpt", {".weight_scale_2": ("F32", [])}, modelopt("FP8"), ".weight_scale_2 should not be there"),
    (
        "NVFP4 of ModelOpt",
        {".weight": ("U8", [32, 64]), ".weight_scale": ("F32", [64, 2]), ".weight_scale_2": None},
        modelopt("W4A16_AWQ") | {"group_size": 64},
        ".weight_scale is [64, 2], of groups of 32 for 64",
    ),
    (
        "NVFP4 of ModelOpt",
        {},
        modelopt("NVFP4") | {"group_size": 32},
        ".weight_scale is [64, 4], of groups of 16 for 32",
    ),
    *(
        (form, {}, modelopt(algorithm), f"its numbers are {held}, and config.json says {said} of all: are config")
        for form, algorithm, held, said in (
            ("NVFP4 of ModelOpt", "FP8", "float4_e2m1fn", "float8_e4m3fn"),
            ("FP8 of ModelOpt", "NVFP4", "float8_e4m3fn", "float4_e2m1fn"),
            ("FP8 of ModelOpt", "W8A16", "float8_e4m3fn", "int8"),
        )
    ),
    (
        "FP8 of compressed-tensors",
        {},
        compressed("float-quantized", num_bits=8, strategy="block", block_structure=[32, 32]),
        ".weight_scale is [64, 1], blocks of 32 x 32 make it [2, 2]",
    ),
    (
        "int8 of compressed-tensors",
        {".weight_zero_point": ("I8", [M, 1])},
        compressed("int-quantized", num_bits=8, strategy="channel", symmetric=False),
        ".weight_zero_point should not be there",
    ),
    (
        "NVFP4 of ModelOpt",
        {".weight_scale": ("F8_E4M3", [M, 3])},
        modelopt("NVFP4"),
        ".weight_scale is [64, 3], expected [64, 4]",
    ),
    ("NVFP4 of ModelOpt", {".weight_scale_2": None}, modelopt("NVFP4"), ".weight_scale_2 is missing"),
    (
        "NVFP4 of ModelOpt",
        {".weight_scale": ("F32", [M, 7])},
        modelopt("W4A16_AWQ"),
        ".weight_scale is [64, 7] of a matrix [128, 32]",
    ),
    (
        "NVFP4 of ModelOpt",
        {".pre_quant_scale": ("BF16", [M + 1])},
        modelopt("NVFP4_AWQ"),
        ".pre_quant_scale is [65], expected [64]",
    ),
    (
        "NVFP4 of compressed-tensors",
        {".weight_global_scale": ("F32", [2])},
        FITTING["NVFP4 of compressed-tensors"],
        "expected one number",
    ),
    (
        "w4a16 of compressed-tensors",
        {},
        compressed("pack-quantized", **{**INTS, "strategy": "group", "group_size": 32}),
        ".weight_scale is [64, 1], groups of 32 make it [64, 2]",
    ),
    (
        "w4a16 of compressed-tensors",
        {".weight_scale": ("BF16", [M, 2])},
        compressed("pack-quantized", **{**INTS, "strategy": "group", "group_size": 48}),
        "groups of 48 do not fill rows of 64",
    ),
    (
        "w4a16 of compressed-tensors",
        {},
        compressed("pack-quantized", **{**INTS, "symmetric": False}),
        "its group says symmetric False, and of zero points the opposite is there",
    ),
    (
        "w4a16 of compressed-tensors",
        {".weight_zero_point": ("I32", [M, 1])},
        compressed("pack-quantized", **{**INTS, "symmetric": False}),
        ".weight_zero_point is [64, 1], expected [8, 1]",
    ),
    (
        "w4a16 of compressed-tensors",
        {".weight_g_idx": ("I32", [M // 2])},
        compressed("pack-quantized", **INTS),
        ".weight_g_idx is [32], expected [64]",
    ),
    (
        "w4a16 of compressed-tensors",
        {},
        compressed("pack-quantized", ("re:.*mlp.*",), **INTS),
        "no group of config_groups is of it",
    ),
    (
        "w4a16 of compressed-tensors",
        {},
        compressed("pack-quantized", ignore=(NAME,), **INTS),
        "config.json says that it is not quantised",
    ),
    ("FP8 in blocks", {".weight_scale_inv": None}, FP8, "it lacks .weight_scale"),
    ("int8 of compressed-tensors", {".weight_scale": None}, FITTING["int8 of compressed-tensors"], "it lacks .weight"),
    ("GPTQ", {}, {**GPTQ, "group_size": 32}, ".scales is [1, 64], groups of 32 make it [2, 64]"),
    ("GPTQ", {".qzeros": ("I32", [2, M // 8])}, GPTQ, ".qzeros is [2, 8], expected [1, 8]"),
    ("GPTQ", {".g_idx": ("I32", [M + 8])}, GPTQ, ".g_idx is [72], expected [64]"),
    ("GPTQ", {".qweight": ("I32", [0, M])}, GPTQ, ".qweight is [0, 64]"),
    ("AWQ", {".qzeros": None}, AWQ, "it lacks .qzeros"),
    ("AWQ", {".qzeros": ("I32", [1, M])}, AWQ, ".qzeros is [1, 64], expected [1, 8]"),
]


@pytest.mark.parametrize(("layout", "change", "said", "wrong"), CONTRADICTIONS)
def test_tensors_that_contradict_the_config_are_refused(layout, change, said, wrong, tmp_path):
    held = {n: kind for n, kind in (LAYOUTS[layout][0] | change).items() if kind}
    with pytest.raises(ExportError) as error:
        open_checkpoint(write(tmp_path, held, said=said))
    line = one_line(error.value)
    assert line.startswith(f"'{NAME}' is quantised (")
    assert wrong in line
    assert line.endswith("are config.json and the weights from the same download?")


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        ({**GPTQ, "bits": 3}, "bits of its quantisation (gptq, 3 bits, one group) is 3, expected 4 or 8"),
        (
            {**GPTQ, "group_size": 0},
            "group_size of its quantisation (gptq, 4 bits) is 0, expected a number of columns, or -1",
        ),
        (
            {**GPTQ, "dynamic": {".*": {"bits": 2}}},
            "bits of its quantisation (gptq, 4 bits, one group) is 2, expected 4",
        ),
        ({**GPTQ, "dynamic": {"-:(": {}}}, "'re:(' is no regular expression"),
        ({**GPTQ, "dynamic": [".*"]}, "['.*'], expected modules, and what is said of each"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "is 'marlin', expected gptq or gptq_v2"),
        (
            {**AWQ, "version": "gemv"},
            "version of its quantisation (awq, 4 bits, groups of 64) is 'gemv', expected gemm",
        ),
        ({**FP8, "fmt": "e5m2"}, "is 'e5m2', expected"),
        (
            {**FP8, "weight_block_size": [128]},
            "weight_block_size of its quantisation (fp8, e4m3, blocks of 128) is [128]",
        ),
        (modelopt("NVFP4_SVD"), "is 'NVFP4_SVD', expected FP8, "),
        (modelopt(None), "quant_algo of its quantisation (modelopt) is None, expected FP8, "),
        (compressed("marlin-24", **INTS), "format of a group is 'marlin-24', expected pack-quantized or "),
        (
            compressed("pack-quantized", **{**INTS, "num_bits": 3}),
            "num_bits of its quantisation (compressed-tensors, pack-quantized, 3 bits) is 3, expected 8 or 4",
        ),
        (compressed("pack-quantized", **{**INTS, "dynamic": True}), "is True, expected False"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "is {}, expected groups of targets"),
        (compressed("pack-quantized", ("re:(",), **INTS), "'re:(' is no regular expression"),
        ({**FP8, "modules_to_not_convert": "lm_head"}, "is 'lm_head', expected names of modules"),
    ],
)
def test_what_is_said_and_not_read_is_refused(said, wrong, tmp_path):
    with pytest.raises(ExportError) as error:
        open_checkpoint(write(tmp_path, LAYOUTS["w4a16 of compressed-tensors"][0], said=said))
    line = one_line(error.value)
    assert line.startswith("config.json: ")
    assert wrong in line


def test_a_config_that_says_quantised_of_plain_weights_is_refused(tmp_path):
    with pytest.raises(ExportError) as error:
        open_checkpoint(write(tmp_path, {".weight": ("BF16", [M, N])}, said=GPTQ))
    assert one_line(error.value) == (
        "config.json says that the weights are quantised (gptq), and no tensor is: "
        "download the weights and config.json again"
    )


def test_quantised_experts_one_by_one_in_place_of_a_stack_are_told(tmp_path):
    stack = "model.layers.1.feed_forward.experts.gate_up_proj"
    one = {"experts.0.gate_proj.weight": ("F8_E4M3", [48, 64]), "experts.0.gate_proj.weight_scale": ("BF16", [48, 1])}
    folder = write(tmp_path, one, "llama4", stack.removesuffix("experts.gate_up_proj"))
    checkpoint = open_checkpoint(folder)
    del checkpoint.tensors[stack]
    with pytest.raises(ExportError, match=r"quantised \(a scale beside each matrix, stored as F8_E4M3\)"):
        weights.check({stack: weights.Parameter(stack, (4, 64, 96))}, checkpoint, (), whole=False)


def test_a_quantised_head_of_a_model_that_says_it_is_tied_is_told(tmp_path):
    head = {".qweight": ("I32", [N, 32]), ".qzeros": ("I32", [1, 32]), ".scales": ("F16", [1, 256])}
    folder = write(tmp_path, head, name="lm_head", said=AWQ)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert "the checkpoint's lm_head.weight is not its model.embed_tokens.weight" in refusal(folder)


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
