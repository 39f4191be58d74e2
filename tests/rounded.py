"""Exports that round a checkpoint: what is written, and what should be, in float64 and by shifts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import torch
from safetensors.torch import load_file

from llmexport.export import archs, onnx_file
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.exported import Export
from llmexport.validate import validate
from llmexport.validate.runners import to_numpy
from llmexport.validate.tolerance import Tolerance

RUNGS = ("transformers", "blocks", "onnxruntime")
KINDS = ("int4", "int8", "fp8")
RANGES = {"int4": (-8, 7), "int8": (-128, 127), "fp8": (-448, 448)}
BITS = np.arange(127)  # of all E4M3 that are not negative: 4 bits of exponent, 3 of mantissa
E4M3 = np.where(BITS < 8, BITS * 2.0**-9, (8 + BITS % 8) * 2.0 ** (BITS // 8 - 10))
EXACT = Tolerance(max_abs=1e-5, rms_ratio=1e-5)  # fp32 roundoff alone: both multiply by the same numbers


def export(checkpoint: Path, out: Path, kind: str | None, group: int | None = None, **options: Any) -> Export:
    found = open_checkpoint(checkpoint)
    named = archs.choose(None, found.config)
    return onnx_file.write(onnx_file.Request(named, found, quantize=kind, group_size=group, **options), out)


def ops_of_its_own(made: Export, source: Path, target: str) -> list[str]:
    """The operators of an export of rounded weights, which passes its rungs, is a checkpoint of the same graph, and is
    compared with the `source` that was rounded."""
    rungs = {r.key: r.status for r in validate(made.folder).rungs}
    assert [rungs[k] for k in RUNGS] == ["pass"] * 3
    again = export(made.folder, made.folder.parent / "again", None, target=target)
    graph = (made.folder / "model.onnx").read_bytes()
    assert (again.folder / "model.onnx").read_bytes() == graph
    moved = validate(made.folder, rungs=["transformers"], reference=source).moved
    assert moved is not None
    assert moved.tokens
    return [n.op_type for n in onnx.load_from_string(graph).graph.node]


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return {n: array(t) for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def array(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    return to_numpy(tensor)


def nearest(weight: np.ndarray, kind: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """In float64: scales in the type of the weight, a row a group of `size` columns, and the numbers nearest to it."""
    low, high = RANGES[kind]
    rows, columns = weight.shape
    numbers = np.empty(weight.shape)
    scales = np.empty((rows, columns // size), weight.dtype)
    for row in range(rows):
        for group in range(columns // size):
            at = slice(group * size, (group + 1) * size)
            wide = weight[row, at].astype(np.float64)
            scale = (np.abs(wide).max() / ((high - low) / 2)).astype(weight.dtype)
            scales[row, group] = scale if scale else 1
            quotient = wide / float(scales[row, group])
            if kind != "fp8":
                numbers[row, at] = np.clip(np.round(quotient), low, high)
                continue
            far = np.abs(np.abs(quotient)[:, None] - E4M3)
            # Of two that are as near, the one whose last bit is zero.
            best = np.argmin(np.where(far == far.min(1, keepdims=True), BITS % 2, 2), 1)
            numbers[row, at] = np.sign(quotient) * E4M3[best]
    return numbers, scales


def stored(held: dict[str, np.ndarray], module: str, kind: str) -> np.ndarray:
    """The numbers that are written, unpacked by shifts."""
    if kind != "int4":
        assert held[f"{module}.weight"].dtype == {"int8": np.int8, "fp8": ml_dtypes.float8_e4m3fn}[kind]
        return held[f"{module}.weight"].astype(np.float64)
    words = held[f"{module}.weight_packed"]
    assert words.dtype == np.int32
    apart = words.view(np.uint32)[..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15
    numbers = apart.reshape(len(words), -1).astype(np.float64) - 8
    assert held[f"{module}.weight_shape"].tolist() == list(numbers.shape)
    return numbers
