"""Checkpoints whose linear layers are packed as published: by shifts and loops written from the formats' descriptions,
and none of our code. Each form gives the tensors of a matrix, and the numbers that it then means."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file

from llmexport.export import archs, random_checkpoint
from llmexport.export.checkpoint import INDEX, open_checkpoint
from llmexport.export.weight_layout import unplaced, write_holes
from llmexport.plugins.dtypes import BY_SAFETENSORS

Held = dict[str, np.ndarray]
# What lies in the place of a tensor, by how its names go on, and what that means.
Form = Callable[[np.ndarray, np.random.Generator], tuple[Held, np.ndarray]]
GROUP = 32
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def words(numbers: np.ndarray, bits: int = 4) -> np.ndarray:
    """Along the last axis, the first number in the lowest bits of an int32."""
    count = 32 // bits
    apart = numbers.astype(np.uint64).reshape(*numbers.shape[:-1], -1, count)
    packed = sum(apart[..., i] << np.uint64(bits * i) for i in range(count))
    return packed.astype(np.uint32).view(np.int32)


def groups(weight: np.ndarray, bits: int, symmetric: bool, dtype: Any = np.float16) -> tuple[np.ndarray, ...]:
    """Unsigned numbers [N, K], scales [N, K / GROUP] and zeros of the same shape."""
    rows, columns = weight.shape
    apart = weight.reshape(rows, columns // GROUP, GROUP)
    top = (1 << bits) - 1
    if symmetric:
        scale = (np.abs(apart).max(-1) / (top // 2)).astype(dtype)
        zero = np.full(scale.shape, (top + 1) // 2)
    else:
        low, high = np.minimum(apart.min(-1), 0), np.maximum(apart.max(-1), 0)
        scale = ((high - low) / top).astype(dtype)
        zero = np.clip(np.round(-low / scale.astype(np.float32)), 0, top).astype(int)
    wide = scale.astype(np.float32)
    numbers = np.clip(np.round(apart / wide[..., None]) + zero[..., None], 0, top).astype(int)
    return numbers.reshape(rows, columns), scale, zero


def meant(numbers: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    return ((numbers - np.repeat(zero, GROUP, 1)) * np.repeat(scale.astype(np.float32), GROUP, 1)).astype(np.float32)


def gptq(
    weight: np.ndarray,
    rng: np.random.Generator,
    *,
    bits: int = 4,
    symmetric: bool = True,
    older: bool = True,
    ordered: bool = False,
) -> tuple[Held, np.ndarray]:
    columns = weight.shape[1]
    order = rng.permutation(columns) if ordered else np.arange(columns)
    numbers, scale, zero = groups(weight[:, order], bits, symmetric)
    value = np.empty_like(weight)
    value[:, order] = meant(numbers, scale, zero)
    as_stored = np.empty_like(numbers)
    as_stored[:, order] = numbers
    index = np.empty(columns, np.int32)
    index[order] = np.arange(columns) // GROUP
    zeros = (zero - older) & ((1 << bits) - 1)
    held = {"qweight": words(as_stored, bits).T, "qzeros": words(zeros.T, bits), "scales": scale.T, "g_idx": index}
    return held, value


def awq(weight: np.ndarray, rng: np.random.Generator) -> tuple[Held, np.ndarray]:
    numbers, scale, zero = groups(weight, 4, symmetric=False)

    def interleaved(along: np.ndarray) -> np.ndarray:
        eights = along.reshape(along.shape[0], -1, 8)
        return words(eights[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(along.shape))

    return {"qweight": interleaved(numbers.T), "qzeros": interleaved(zero.T), "scales": scale.T}, meant(
        numbers, scale, zero
    )


def packed(
    weight: np.ndarray, rng: np.random.Generator, *, bits: int = 4, symmetric: bool = True, ordered: bool = False
) -> tuple[Held, np.ndarray]:
    """compressed-tensors, pack-quantized."""
    columns = weight.shape[1]
    order = rng.permutation(columns) if ordered else np.arange(columns)
    numbers, scale, zero = groups(weight[:, order], bits, symmetric, ml_dtypes.bfloat16)
    value, as_stored, index = np.empty_like(weight), np.empty_like(numbers), np.empty(columns, np.int32)
    value[:, order], as_stored[:, order] = meant(numbers, scale, zero), numbers
    index[order] = np.arange(columns) // GROUP
    held = {"weight_packed": words(as_stored, bits), "weight_scale": scale, "weight_shape": np.array(weight.shape)}
    if not symmetric:
        held["weight_zero_point"] = words(zero.T, bits).T
    return held | ({"weight_g_idx": index} if ordered else {}), value


def int8(weight: np.ndarray, rng: np.random.Generator) -> tuple[Held, np.ndarray]:
    scale = (np.abs(weight).max(1, keepdims=True) / 127).astype(ml_dtypes.bfloat16)
    numbers = np.clip(np.round(weight / scale.astype(np.float32)), -127, 127).astype(np.int8)
    return {"weight": numbers, "weight_scale": scale}, numbers * scale.astype(np.float32)


def fp8(
    weight: np.ndarray,
    rng: np.random.Generator,
    *,
    block: tuple[int, int] | None,
    name: str = "weight_scale",
    dtype: Any = np.float32,
    shape: tuple[int, ...] | None = None,
    beside: Mapping[str, float] | None = None,
) -> tuple[Held, np.ndarray]:
    """E4M3 with a scale for each block, of the whole matrix where it is None."""
    rows, columns = weight.shape
    tall, wide = block or weight.shape
    tall = tall or rows
    wide = wide or columns
    grid = np.array(
        [
            [np.abs(weight[i : i + tall, j : j + wide]).max() / 448 for j in range(0, columns, wide)]
            for i in range(0, rows, tall)
        ]
    )
    grid = (np.exp2(np.ceil(np.log2(grid))) if dtype == ml_dtypes.float8_e8m0fnu else grid).astype(dtype)
    spread = np.repeat(np.repeat(grid.astype(np.float32), tall, 0)[:rows], wide, 1)[:, :columns]
    numbers = (weight / spread).astype(ml_dtypes.float8_e4m3fn)
    held = {"weight": numbers, name: grid.reshape(shape if shape is not None else grid.shape)}
    held |= {n: np.float32(v) for n, v in (beside or {}).items()}
    return held, numbers.astype(np.float32) * spread


def fp4(weight: np.ndarray, rng: np.random.Generator, *, tool: str) -> tuple[Held, np.ndarray]:
    """NVFP4 of ModelOpt or of compressed-tensors, or MXFP4 of the latter."""
    rows, columns = weight.shape
    size = 32 if tool == "mx" else 16
    apart = weight.reshape(rows, columns // size, size)
    most = np.abs(apart).max(-1)
    if tool == "mx":
        exponents = np.floor(np.log2(most)).astype(int) - 2 + 127
        scale, stored = np.exp2(exponents - 127).astype(np.float32), exponents.astype(np.uint8)
        extra: Held = {}
    else:
        second = np.float32(np.abs(weight).max() / (6 * 448))
        stored = (most / 6 / second).astype(ml_dtypes.float8_e4m3fn)
        if tool == "modelopt":
            scale = stored.astype(np.float32) * second
            extra = {"weight_scale_2": second, "input_scale": np.float32(0.01)}
        else:
            divisor = np.array([1 / second], np.float32)
            scale = stored.astype(np.float32) / divisor[0]
            extra = {"weight_global_scale": divisor, "input_global_scale": np.array([100], np.float32)}
    near = np.abs(apart[..., None] / scale[..., None, None] - E2M1).argmin(-1)
    codes = near.reshape(rows, columns)
    held = {"weight" if tool == "modelopt" else "weight_packed": (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8)}
    value = (E2M1[codes].reshape(apart.shape) * scale[..., None]).reshape(rows, columns)
    return held | {"weight_scale": stored} | extra, value.astype(np.float32)


def pairs(weight: np.ndarray, rng: np.random.Generator) -> tuple[Held, np.ndarray]:
    """ModelOpt's W4A16_AWQ: two rows a byte, two's complement, and a factor of the inputs."""
    columns = weight.shape[1]
    factor = rng.uniform(0.5, 2, columns).astype(ml_dtypes.bfloat16)
    numbers, scale, zero = groups(weight / factor.astype(np.float32), 4, True, np.float32)
    signed = (numbers - 8) & 15
    held = {
        "weight": (signed[::2] | signed[1::2] << 4).astype(np.uint8),
        "weight_scale": scale,
        "pre_quant_scale": factor,
    }
    return held, meant(numbers, scale, zero) * factor.astype(np.float32)


def compressed(kind: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"dynamic": False, **weights}, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def modelopt(algorithm: str) -> dict[str, Any]:
    return {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "ignore": ["lm_head"],
    }


@dataclass(frozen=True)
class Published:
    """A published way to quantise: how a matrix is stored, and what config.json says."""

    form: Form
    config: Mapping[str, Any]


def _with(form: Any, **how: Any) -> Form:
    return lambda weight, rng: form(weight, rng, **how)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
INTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": True}
FORMS: dict[str, Published] = {
    "gptq": Published(gptq, GPTQ),
    "gptq-v2-asymmetric": Published(
        _with(gptq, symmetric=False, older=False), {**GPTQ, "sym": False, "checkpoint_format": "gptq_v2"}
    ),
    "gptq-asymmetric": Published(_with(gptq, symmetric=False), {**GPTQ, "sym": False}),
    "gptq-act-order": Published(_with(gptq, ordered=True), {**GPTQ, "desc_act": True}),
    "gptq-act-order-asymmetric": Published(
        _with(gptq, ordered=True, symmetric=False), {**GPTQ, "desc_act": True, "sym": False}
    ),
    "gptq-8-bits": Published(_with(gptq, bits=8), {**GPTQ, "bits": 8}),
    "awq": Published(
        awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    ),
    "w4a16": Published(packed, compressed("pack-quantized", **INTS)),
    "w4a16-asymmetric": Published(
        _with(packed, symmetric=False), compressed("pack-quantized", **{**INTS, "symmetric": False})
    ),
    "w4a16-act-order": Published(_with(packed, ordered=True), compressed("pack-quantized", **INTS, actorder="group")),
    "w8a16": Published(_with(packed, bits=8), compressed("pack-quantized", **{**INTS, "num_bits": 8})),
    "w8a8": Published(int8, compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True)),
    "fp8-block": Published(_with(fp8, block=(32, 48), name="weight_scale_inv"), {**FP8, "weight_block_size": [32, 48]}),
    "fp8-block-of-powers": Published(
        _with(fp8, block=(32, 32), name="weight_scale_inv", dtype=ml_dtypes.float8_e8m0fnu),
        {**FP8, "weight_block_size": [32, 32], "scale_fmt": "ue8m0"},
    ),
    "fp8-tensor": Published(
        _with(fp8, block=None, name="weight_scale_inv", shape=()), {**FP8, "weight_block_size": None}
    ),
    "fp8-modelopt": Published(_with(fp8, block=None, shape=(), beside={"input_scale": 0.1}), modelopt("FP8")),
    "fp8-dynamic": Published(
        _with(fp8, block=(1, 0), dtype=ml_dtypes.bfloat16),
        compressed("float-quantized", num_bits=8, type="float", strategy="channel", symmetric=True),
    ),
    "fp8-block-compressed": Published(
        _with(fp8, block=(32, 32), dtype=ml_dtypes.bfloat16),
        compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[32, 32]),
    ),
    "fbgemm": Published(
        _with(fp8, block=(1, 0), beside={"input_scale_ub": 1200}),
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]},
    ),
    "nvfp4-modelopt": Published(_with(fp4, tool="modelopt"), modelopt("NVFP4")),
    "nvfp4": Published(
        _with(fp4, tool="compressed-tensors"),
        compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
    ),
    "mxfp4": Published(
        _with(fp4, tool="mx"),
        compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
    ),
    "w4a16-modelopt": Published(pairs, modelopt("W4A16_AWQ")),
}


def of_blocks(
    name: str, weight: np.ndarray, *, block: tuple[int, int] | None, dtype: Any = np.float32
) -> tuple[Held, np.ndarray]:
    """transformers' fp8 of a stack [experts, outputs, inputs]; without blocks gate, up and down have a scale each."""
    experts, rows, columns = weight.shape
    tall, wide = block or (rows // 2 if "gate_up" in name else rows, columns)
    held, value = np.empty(weight.shape, ml_dtypes.float8_e4m3fn), np.empty(weight.shape)
    grid = np.empty((experts, -(-rows // tall), -(-columns // wide)), dtype)
    for e, i, j in np.ndindex(grid.shape):
        here = np.s_[e, i * tall : (i + 1) * tall, j * wide : (j + 1) * wide]
        scale = np.abs(weight[here]).max() / 448
        grid[e, i, j] = scale if dtype == np.float32 else np.exp2(np.ceil(np.log2(scale)))
        held[here] = (weight[here] / grid[e, i, j].astype(np.float32)).astype(held.dtype)
        value[here] = held[here].astype(np.float64) * grid[e, i, j].astype(np.float64)
    return {"": held, "_scale_inv": grid}, value


def of_columns(name: str, weight: np.ndarray, *, each: str) -> tuple[Held, np.ndarray]:
    """E4M3 of a stack [experts, inputs, outputs]: of fbgemm_fp8 a scale for `each` output, of ModelOpt one for each
    expert or for all."""
    experts, _, rows = weight.shape
    axes = {"output": (1,), "expert": (1, 2), "all": (0, 1, 2)}[each]
    scale = (np.abs(weight).max(axes, keepdims=True) / 448).astype(np.float32)
    held = (weight / scale).astype(ml_dtypes.float8_e4m3fn)
    value = held.astype(np.float64) * scale.astype(np.float64)
    if each == "output":
        return {"": held, "_scale": scale if "gate_up" in name else scale.reshape(experts, rows, 1)}, value
    shape = (experts,) if each == "expert" else ()
    return {"": held, "_weight_scale": scale.reshape(shape), "_input_scale": np.float32(0.1)}, value


def of_nibbles(name: str, weight: np.ndarray) -> tuple[Held, np.ndarray]:
    """ModelOpt's NVFP4 of a stack [experts, inputs, outputs]: two inputs a byte, groups of 16 inputs."""
    experts, columns, rows = weight.shape
    second = np.float32(np.abs(weight).max() / (6 * 448))
    held = np.empty((experts, columns // 2, rows), np.uint8)
    grid = np.empty((experts, columns // 16, rows), ml_dtypes.float8_e4m3fn)
    value = np.empty(weight.shape)
    for e, group in np.ndindex(experts, columns // 16):
        own = weight[e, 16 * group : 16 * (group + 1)]
        grid[e, group] = (np.abs(own).max(0) / 6 / second).astype(grid.dtype)
        scale = grid[e, group].astype(np.float64) * np.float64(second)
        codes = np.abs(own[..., None] / scale[:, None] - E2M1).argmin(-1)
        held[e, 8 * group : 8 * (group + 1)] = codes[::2] | codes[1::2] << 4
        value[e, 16 * group : 16 * (group + 1)] = E2M1[codes] * scale
    beside = {"_weight_scale": grid, "_weight_scale_2": second, "_input_scale": np.float32(0.1)}
    return {"": held, **beside}, value


# How experts of several in one tensor are stored: beside which of FORMS, and what of a tensor's name and numbers.
STACKS: dict[str, tuple[str, Callable[[str, np.ndarray], tuple[Held, np.ndarray]]]] = {
    "blocks": ("fp8-block", functools.partial(of_blocks, block=(32, 48))),
    "blocks-of-powers": (
        "fp8-block-of-powers",
        functools.partial(of_blocks, block=(32, 32), dtype=ml_dtypes.float8_e8m0fnu),
    ),
    "matrices": ("fp8-tensor", functools.partial(of_blocks, block=None)),
    "fbgemm": ("fbgemm", functools.partial(of_columns, each="output")),
    "modelopt": ("fp8-modelopt", functools.partial(of_columns, each="all")),
    "modelopt-experts": ("fp8-modelopt", functools.partial(of_columns, each="expert")),
    "modelopt-nvfp4": ("nvfp4-modelopt", of_nibbles),
}
KEPT = ("embed", "lm_head", "router", ".gate.weight", "norm", "conv", "_bias")


def write(
    folder: Path, form: str, arch: str = "llama", config: Mapping[str, Any] | None = None, stacks: str | None = None
) -> Path:
    """A tiny checkpoint of random weights whose linear layers are stored so, in `folder`/ck; what its weights mean is
    in `folder`/meant, an unquantised checkpoint of float32. stacks: of STACKS, how experts of one tensor are stored."""
    published, rng = FORMS[form], np.random.default_rng(0)
    named = archs.load(arch)
    random_checkpoint.write(named, folder / "plain", config=config)
    config = json.loads((folder / "plain" / "config.json").read_text())
    tensors = {}
    for file in sorted((folder / "plain").glob("*.safetensors")):
        tensors |= load_file(file)
    held: Held = {}
    values: Held = {}
    for name, stored in tensors.items():
        wide = np.asarray(stored).astype(np.float32)
        if stacks and wide.ndim == 3 and "experts" in name:
            own, value = STACKS[stacks][1](name, wide)
            held |= {f"{name}{end}": array for end, array in own.items()}
            values[name] = value.astype(np.float32)
            continue
        odd = wide.ndim != 2 or wide.shape[0] % 8 or wide.shape[1] % GROUP
        if odd or any(k in name for k in KEPT):
            held[name], values[name] = np.asarray(stored), wide
            continue
        own, value = published.form(wide, rng)
        held |= {f"{name.removesuffix('weight')}{end}": array for end, array in own.items()}
        values[name] = value
    save(folder / "ck", {**config, "quantization_config": dict(published.config)}, held)
    save(folder / "meant", config, values)
    return folder / "ck"


def save(folder: Path, config: Mapping[str, Any], arrays: Held) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({n: tensor(a) for n, a in arrays.items()}, folder / "model.safetensors", {"format": "pt"})


def tensor(array: np.ndarray | np.generic) -> torch.Tensor:
    """The array as torch's tensor, of the types that numpy lacks too."""
    held = np.array(array, order="C")
    names = {"bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn, "float8_e8m0fnu": torch.float8_e8m0fnu}
    if dtype := names.get(held.dtype.name):
        raw = np.int16 if held.itemsize == 2 else np.uint8
        return torch.from_numpy(held.reshape(-1).view(raw)).view(dtype).reshape(held.shape)
    return torch.from_numpy(held)


def _cut(number: int, by: int) -> int:
    return -(-number // by)


# What lies in the place of a weight [rows, columns], by what a published config says; groups are of 128.
HOLES: dict[str, Callable[[int, int], dict[str, tuple[str, list[int]]]]] = {
    "fp8": lambda n, k: {"weight": ("F8_E4M3", [n, k]), "weight_scale_inv": ("F32", [_cut(n, 128), _cut(k, 128)])},
    "fbgemm_fp8": lambda n, k: {"weight": ("F8_E4M3", [n, k]), "weight_scale": ("F32", [n, 1])},
    "float-quantized": lambda n, k: {"weight": ("F8_E4M3", [n, k]), "weight_scale": ("BF16", [n, 1])},
    "pack-quantized": lambda n, k: {
        "weight_packed": ("I32", [n, k // 8]), "weight_scale": ("BF16", [n, k // 128]), "weight_shape": ("I64", [2])
    },
    "awq": lambda n, k: {
        "qweight": ("I32", [k, n // 8]), "qzeros": ("I32", [k // 128, n // 8]), "scales": ("F16", [k // 128, n])
    },
    "FP8": lambda n, k: {
        "weight": ("F8_E4M3", [n, k]), "weight_scale": ("F32", []), "input_scale": ("F32", [])
    },
    "NVFP4": lambda n, k: {
        "weight": ("U8", [n, k // 2]), "weight_scale": ("F8_E4M3", [n, k // 16]),
        "weight_scale_2": ("F32", []), "input_scale": ("F32", []),
    },
}  # fmt: skip
# And in that of experts of several in one tensor, [experts, outputs, inputs] of the first, [experts, inputs, outputs]
# of the others.
HOLES_OF_STACKS: dict[str, Callable[[int, int, int], dict[str, tuple[str, list[int]]]]] = {
    "fp8": lambda e, n, k: {"": ("F8_E4M3", [e, n, k]), "_scale_inv": ("F32", [e, _cut(n, 128), _cut(k, 128)])},
    "fbgemm_fp8": lambda e, k, n: {"": ("F8_E4M3", [e, k, n]), "_scale": ("F32", [e, 1, n])},
    "FP8": lambda e, k, n: {"": ("F8_E4M3", [e, k, n]), "_weight_scale": ("F32", []), "_input_scale": ("F32", [])},
    "NVFP4": lambda e, k, n: {
        "": ("U8", [e, k // 2, n]), "_weight_scale": ("F8_E4M3", [e, k // 16, n]), "_weight_scale_2": ("F32", []),
    },
}  # fmt: skip


def hollow(folder: Path, config: Mapping[str, Any], kept: tuple[str, ...] = KEPT) -> Path:
    """A checkpoint of holes of a published size, whose linear layers and experts are stored as its quantization_config
    says."""
    said = config["quantization_config"]
    kind = next(w for w in (said.get("quant_algo"), said.get("format"), said.get("quant_method")) if w)
    form = HOLES[kind]
    unquantised = {k: v for k, v in config.items() if k != "quantization_config"}
    random_checkpoint.write(archs.choose(None, config), folder / "plain", config=unquantised, hollow=True)
    plain = open_checkpoint(folder / "plain")
    made = folder / "ck"
    made.mkdir()
    (made / "config.json").write_text(json.dumps({**plain.config, "quantization_config": said}))
    placed = {}
    for shard in plain.shards:
        header: dict[str, Any] = {}
        for tensor in (t for t in plain.tensors.values() if t.file == shard.file):
            if len(tensor.shape) == 3 and "experts" in tensor.name:
                header |= {tensor.name + end: held for end, held in HOLES_OF_STACKS[kind](*tensor.shape).items()}
                continue
            if len(tensor.shape) != 2 or any(k in tensor.name for k in kept):
                header[tensor.name] = (tensor.dtype, tensor.shape)
                continue
            module = tensor.name.removesuffix("weight")
            header |= {module + end: held for end, held in form(*tensor.shape).items()}
        placed |= dict.fromkeys(header, shard.file)
        held = [unplaced(n, BY_SAFETENSORS[dtype], tuple(shape)) for n, (dtype, shape) in header.items()]
        write_holes(made / shard.file, held)
    if len(plain.shards) > 1:
        (made / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return made
