"""A plugin layer, by the torch reference of its op and the attributes that TensorRT's plugin holds."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from llmexport.export.network.kinds import Array, Compute, Unable
from llmexport.plugins.joined import BIASED, COLUMNS, JOINED, Part, parts_of
from llmexport.plugins.normed import ADDENDS, EXPERTS, GATE_COLUMN, NORM, inputs_of
from llmexport.plugins.normed_route import normed_routes
from llmexport.plugins.shared_route import shared_ops
from llmexport.plugins.spec import all_ops

if TYPE_CHECKING:
    from torch import Tensor


def reference(trt: Any, layer: Any) -> Compute:
    """What the plugin says of itself is read, and never a node of ONNX: a field may have been lost on the way."""
    kinds = trt.PluginCapabilityType
    core, build = (layer.plugin.get_capability_interface(kind) for kind in (kinds.CORE, kinds.BUILD))
    name = core.plugin_name.removeprefix(BIASED).removeprefix(JOINED)
    said = json.loads(build.metadata_string or "{}")
    if core.plugin_name in ADDENDS:
        return _normed(core.plugin_name, said)
    ops = all_ops() | shared_ops() | normed_routes()
    if name not in ops:
        raise Unable(f"plugin {core.plugin_name} is no op of ours")
    op = ops[name]
    columns = said.pop(COLUMNS, []) if name != core.plugin_name else None
    attributes = _attributes(said, op.attributes)

    def compute(*given: Array) -> tuple[Array, ...]:
        import torch

        # A node leaves out optional inputs from the end.
        names, tensors = [*op.inputs], dict.fromkeys(op.inputs)
        if columns is not None:
            names = [n for n in names if n not in op.joins]
            x, *others = map(_tensor, given[: 1 + core.plugin_name.startswith(BIASED)])
            tensors |= _columns(x + others[0] if others else x, parts_of(op.inputs, op.joins, columns))
            given = given[1 + len(others) :]
        tensors |= {n: _tensor(x) for n, x in zip(names, given, strict=False)}
        with torch.inference_mode():
            made = op.reference(**tensors, **attributes)
        return tuple(map(_array, made if isinstance(made, tuple) else (made,)))

    return compute


def _normed(name: str, said: dict[str, Any]) -> Compute:
    """A plugin of plugins/normed.py: the references of its ops, and what torch makes between them."""
    experts, norm = all_ops()[EXPERTS], all_ops()[NORM]
    inputs, gated = inputs_of(name, [*experts.inputs]), len(ADDENDS[name]) > 1
    attributes = _attributes(said, experts.attributes | norm.attributes | ({GATE_COLUMN: int} if gated else {}))

    def compute(*given: Array) -> tuple[Array, ...]:
        import torch

        tensors = {n: _tensor(x) for n, x in zip(inputs, given, strict=False)}
        with torch.inference_mode():
            of_experts, of_norm = ({n: attributes[n] for n in op.attributes} for op in (experts, norm))
            y = experts.reference(**{n: tensors.get(n) for n in experts.inputs}, **of_experts)
            if "shared" in tensors:
                shared = tensors["shared"]
                if gated:
                    shared = tensors["shared_gate"][..., attributes[GATE_COLUMN], None].sigmoid() * shared
                y = y + shared
            made = norm.reference(y, tensors["residual"], tensors["norm_weight"], None, **of_norm)
        return tuple(map(_array, made))

    return compute


def _attributes(said: dict[str, Any], kinds: Mapping[str, type]) -> dict[str, Any]:
    """Those that a plugin holds. Raises Unable if they are not the ones that it should."""
    if said.keys() != kinds.keys():
        raise Unable(f"the plugin holds {said}, its op has the attributes {', '.join(kinds)}")
    return {name: kind(said[name]) for name, kind in kinds.items()}


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
