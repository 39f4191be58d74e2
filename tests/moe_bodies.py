"""MoeExperts and its body as a model of one node, and what ONNX Runtime makes of it; shared by the tests of bodies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from moe_cases import FORMATS, LAYOUTS, OPTIONAL, E, Layout
from op_model import node_model, run
from torch import Tensor

TOKENS = [(1, 1), (1, 7), (2, 65)]
WEIGHTS = ("gate_up", "down", *OPTIONAL)
EVERY = {**LAYOUTS, **FORMATS}
layouts = pytest.mark.parametrize("layout", EVERY.values(), ids=EVERY)
CHOICES = {
    "one expert has all tokens": torch.full((1, 130, 1), 4),
    "all experts have all tokens": torch.arange(E).expand(1, 130, E),
    "a token has one expert twice": torch.tensor([2, 2, 5]).expand(1, 130, 3),
    "most tokens have the last expert": torch.full((1, 130, 1), E - 1).index_fill(1, torch.tensor([7, 90]), 0),
}


def model(layout: Layout, tensors: dict[str, Tensor], target: str = "portable") -> onnx.ModelProto:
    return node_model("MoeExperts", layout.attributes, tensors, [n for n in WEIGHTS if n in tensors], target)


def found(runtime: onnxruntime.InferenceSession, tensors: dict[str, Tensor]) -> Tensor:
    return torch.from_numpy(run(runtime, tensors)[0])


def poisoned(tensors: dict[str, Tensor], experts: slice) -> dict[str, Tensor]:
    """The same with no number in the weights of these experts."""
    poison = {torch.uint8: 255, torch.float32: torch.nan}
    changed = {n: tensors[n].clone() for n in tensors.keys() & set(WEIGHTS)}
    for tensor in changed.values():
        tensor[experts] = poison[tensor.dtype]
    return tensors | changed


def optioned(model: onnx.ModelProto, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def ran(model: onnx.ModelProto, tensors: dict[str, Tensor], folder: Path) -> list[dict[str, Any]]:
    """What each operator that ran says of itself: "op_name", "output_size" and others. Files go into the folder."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "run")
    runtime = optioned(model, options)
    run(runtime, tensors)
    events = json.loads(Path(runtime.end_profiling()).read_text())
    return [e["args"] for e in events if e["name"].endswith("_kernel_time")]


def kept(model: onnx.ModelProto, folder: Path) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Type and shape of each constant of rank 3 that ONNX Runtime keeps."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimised.onnx"), 3
    optioned(model, options)
    graph = onnx.load(folder / "optimised.onnx").graph
    return {t.name: (t.data_type, tuple(t.dims)) for t in graph.initializer if len(t.dims) == 3}


def as_stored(tensors: dict[str, Tensor]) -> dict[str, tuple[int, tuple[int, ...]]]:
    """The same of the weights themselves."""
    kinds = {torch.uint8: onnx.TensorProto.UINT8, torch.bfloat16: onnx.TensorProto.BFLOAT16}
    kinds[torch.float32] = onnx.TensorProto.FLOAT
    return {n: (kinds[t.dtype], tuple(t.shape)) for n, t in tensors.items() if n in WEIGHTS and t.ndim == 3}
