"""Ops and plugins as operators of ONNX's reference evaluator, by their references."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from onnx.reference.op_run import OpRun
from plugin_cases import array_of

from llmexport.plugins.spec import Op


def tensor_of(array: np.ndarray) -> torch.Tensor:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def operator(name: str, op: Op) -> type[OpRun]:
    """For `new_ops`; a node may leave out the op's last inputs."""

    def run(self: OpRun, *given: np.ndarray, **said: Any) -> tuple[np.ndarray, ...]:
        tensors = dict.fromkeys(op.inputs) | {n: tensor_of(x) for n, x in zip(op.inputs, given, strict=False)}
        made = op.reference(**tensors, **{n: kind(said[n]) for n, kind in op.attributes.items()})
        return tuple(array_of(y.contiguous()) for y in (made if isinstance(made, tuple) else (made,)))

    return type(name, (OpRun,), {"op_domain": "llmexport", "_run": run})
