"""The matrices of a quantised checkpoint, told by the endings of its tensors' names and held against what it says."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmexport.export.errors import ExportError
from llmexport.export.packed.matrix import Matrix
from llmexport.export.packed.module import HOLDS, Module, dtype_of
from llmexport.export.packed.scheme import Scheme, read_scheme
from llmexport.export.packed.stacked import ENDINGS as STACKED
from llmexport.export.packed.stacked import Stack
from llmexport.export.values import show_name

if TYPE_CHECKING:
    from llmexport.export.checkpoint import Checkpoint
    from llmexport.export.stored_tensor import StoredTensor

# The longest first: what a matrix NAME.weight is made of.
ENDINGS = (
    *(".weight_scale_inv", ".weight_global_scale", ".weight_zero_point", ".weight_scale_2", ".weight_packed"),
    *(".weight_shape", ".weight_g_idx", ".weight_scale", ".input_global_scale", ".input_scale_ub", ".input_scale"),
    *(".activation_scale", ".pre_quant_scale", ".input_zero_point", ".qweight", ".qzeros", ".scales", ".g_idx"),
    ".weight",
)
# Of these alone a module's tensors are quantised.
MARKS = (".weight_scale_inv", ".weight_scale", ".weight_packed", ".qweight", ".scales", ".qzeros", ".weight_scale_2")
# Scales of a cache in 8 bits, which is not made here.
CACHE_SCALES = (
    *(".k_scale", ".v_scale", ".kv_scale", ".q_scale", ".prob_scale", ".k_proj.output_scale", ".v_proj.output_scale"),
    *(".k_zero_point", ".v_zero_point"),
)


def matrices_of(config: Mapping[str, Any], folder: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, Matrix]:
    """The matrices in few bits of a checkpoint; none if nothing says that it has any. Raises as read_matrices does."""
    scheme = read_scheme(config, folder)
    return read_matrices(scheme, tensors) if scheme else {}


def read_matrices(scheme: Scheme, tensors: Mapping[str, StoredTensor]) -> dict[str, Matrix]:
    """The matrices by the names that they would have unquantised.

    Raises ExportError on one that is not as the scheme says, or if there is none.
    """
    modules: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    stacks: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if ending := next((e for e in ENDINGS if name.endswith(e)), None):
            modules[name.removesuffix(ending)][ending] = tensor
            continue
        ending = next((e for e in STACKED if name.endswith(e)), "")
        whole = tensors.get(stack := name.removesuffix(ending)) if ending else None
        if whole and len(whole.shape) == 3:
            stacks[stack] |= {"": whole, ending: tensor}
    found = {name: Stack(scheme, name, held).matrix() for name, held in stacks.items()}
    for module, held in modules.items():
        own = Module(scheme, module, held)
        # Numbers without scales are wrong as well.
        alone = ".weight" in held and dtype_of(held[".weight"]) in HOLDS.get(own.kind, ())
        if alone or any(mark in held for mark in MARKS):
            found[f"{module}.weight"] = own.matrix()
    if not found:
        raise ExportError(
            f"{scheme.where} says that the weights are quantised ({scheme.method}), and no tensor is: "
            "download the weights and config.json again"
        )
    for name, matrix in found.items():
        if scheme.number not in (None, matrix.number):
            raise ExportError(
                f"{show_name(name.removesuffix('.weight'))} is quantised ({scheme.method}) otherwise than is said: its "
                f"numbers are {matrix.number}, and {scheme.where} says {scheme.number} of all: are config.json and the "
                "weights from the same download?"
            )
    return found


def cache_scales(tensors: Mapping[str, StoredTensor]) -> Iterator[str]:
    """The tensors that are scales of a quantised cache."""
    return (n for n in tensors if n.endswith(CACHE_SCALES))


def spare(checkpoint: Checkpoint, used: Collection[str]) -> set[str]:
    """The tensors beside matrices in few bits that change no number: scales of a quantised cache, and of biases that
    no model has `used` those that are zero, as AutoGPTQ writes one of every matrix."""
    if not checkpoint.matrices:
        return set()
    biases = {f"{name.removesuffix('.weight')}.bias" for name in checkpoint.matrices}
    unread = (biases & checkpoint.tensors.keys()) - {*used}
    return {*cache_scales(checkpoint.tensors), *(n for n in unread if not checkpoint.read(n).any())}
