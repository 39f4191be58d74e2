"""A plugin layer, by the torch reference of its op and the attributes that TensorRT's plugin holds."""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from llmexport.export.network.kinds import Array, Compute, Unable
from llmexport.plugins.joined import COLUMNS, JOINED, Part, parts_of
from llmexport.plugins.spec import all_ops

if TYPE_CHECKING:
    from torch import Tensor


def reference(trt: Any, layer: Any) -> Compute:
    """What the plugin says of itself is read, and never a node of ONNX: a field may have been lost on the way."""
    kinds = trt.PluginCapabilityType
    core, build = (layer.plugin.get_capability_interface(kind) for kind in (kinds.CORE, kinds.BUILD))
    name = core.plugin_name.removeprefix(JOINED)
    if name not in all_ops():
        raise Unable(f"plugin {core.plugin_name} is no op of ours")
    op = all_ops()[name]
    said = json.loads(build.metadata_string or "{}")
    columns = said.pop(COLUMNS, []) if name != core.plugin_name else None
    if said.keys() != op.attributes.keys():
        raise Unable(f"the plugin holds {said}, its op has the attributes {', '.join(op.attributes)}")
    attributes = {name: kind(said[name]) for name, kind in op.attributes.items()}

    def compute(*given: Array) -> tuple[Array, ...]:
        import torch

        # A node leaves out optional inputs from the end.
        names, tensors = [*op.inputs], dict.fromkeys(op.inputs)
        if columns is not None:
            names = [n for n in names if n not in op.joins]
            tensors |= _columns(_tensor(given[0]), parts_of(op.inputs, op.joins, columns))
            given = given[1:]
        tensors |= {n: _tensor(x) for n, x in zip(names, given, strict=False)}
        with torch.inference_mode():
            made = op.reference(**tensors, **attributes)
        return tuple(map(_array, made if isinstance(made, tuple) else (made,)))

    return compute


def _columns(x: Tensor, parts: list[Part]) -> dict[str, Tensor]:
    """What an op reads of a tensor [B, T, columns]."""
    return {p.name: x[..., p.first : p.end].unflatten(-1, p.sizes) for p in parts}


def _tensor(x: Array) -> Tensor:
    import torch

    # TensorRT gives plugins no uint8 and calls bytes int8; of bf16 numpy and torch know different types.
    seen = {np.dtype(np.int8): np.uint8, np.dtype(ml_dtypes.bfloat16): np.int16}.get(x.dtype, x.dtype)
    with warnings.catch_warnings():
        # Weights are where they lie, and no op writes to what it reads.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(np.ascontiguousarray(x).view(seen))
    return tensor.view(torch.bfloat16) if x.dtype == ml_dtypes.bfloat16 else tensor


def _array(tensor: Tensor) -> Array:
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.contiguous().numpy()
