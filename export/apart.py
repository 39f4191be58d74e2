"""Experts that a checkpoint has in one tensor, as if each had its matrices there: for what rounds them one by one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from llmexport.export.assembly import checkpoint_name, part_names, parts
from llmexport.export.checkpoint import Checkpoint
from llmexport.export.coded import Coded
from llmexport.export.multimodal import outer_of
from llmexport.export.packed.matrix import Matrix, Scales
from llmexport.export.packed.scheme import without
from llmexport.export.spec import Arch, Experts, Model, Mxfp4, Plain, Stored
from llmexport.export.stored_tensor import StoredTensor
from llmexport.plugins.dtypes import BY_NAME, BY_SAFETENSORS, FLOATS
from llmexport.plugins.microscaling import BLOCK


def with_experts_apart(arch: Arch, model: Model, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint whose experts lie one by one, by the names that the architecture has for those, of the same bytes.

    The same one if there are none in one tensor, or if the architecture has no names. Those that lie [inputs, outputs]
    are read as their transposes, which the config says where it can; those in MXFP4 as what they mean, in bfloat16,
    which holds each of those numbers.
    """
    every = [(p.path, p.block) for step in model.steps for p in parts(step) if isinstance(p.block, Experts)]
    found: dict[str, list[StoredTensor]] = {}
    for path, block in every:
        if block.storage == Plain():
            found |= _matrices(arch, model, checkpoint, path, block)
        elif block.storage == Mxfp4():
            cut = _in_mxfp4(arch, model, checkpoint, path, block)
            if not cut:
                # A config speaks of all of them.
                return checkpoint
            found |= cut
    if not found:
        return checkpoint
    tensors = {t.name: t for n, whole in checkpoint.tensors.items() for t in found.get(n, [whole])}
    turned = any(t.turned for held in found.values() for t in held)
    config = without(_said(arch, checkpoint.config) if turned and arch.apart else checkpoint.config)
    return replace(checkpoint, tensors=tensors, config=config)


def _matrices(
    arch: Arch, model: Model, checkpoint: Checkpoint, path: str, block: Experts
) -> dict[str, list[StoredTensor]]:
    """The stacks of a block by their names, as its experts' matrices; none if one of them cannot be read so."""
    found: dict[str, list[StoredTensor]] = {}
    for name, size in block.sizes.items():
        stack = checkpoint_name(arch, model, path + name)
        shape = (block.experts, *(size[::-1] if block.transposed else size))
        whole = checkpoint.tensors.get(stack)
        # What is wrong with another is said by its own name.
        if whole is None or whole.shape != shape or BY_SAFETENSORS[whole.dtype].name not in FLOATS:
            return {}
        names = part_names(arch, path + name, block.experts)
        if not names or not checkpoint.tensors.keys().isdisjoint(names):
            return {}
        found[stack] = [*_cut(whole, names, turned=block.transposed)]
    return found


def _in_mxfp4(
    arch: Arch, model: Model, checkpoint: Checkpoint, path: str, block: Experts
) -> dict[str, list[StoredTensor]]:
    """The same of stacks in MXFP4, whose scales are then no tensors any more."""
    found: dict[str, list[StoredTensor]] = {}
    for name, (rows, columns) in block.sizes.items():
        stack, names = checkpoint_name(arch, model, path + name), part_names(arch, path + name, block.experts)
        values, exponents = (_bytes(checkpoint, stack, stored) for stored in block.matrices[name])
        if values is None or exponents is None or not checkpoint.tensors.keys().isdisjoint(names):
            return {}
        found |= {values.name: [], exponents.name: []}
        each, groups = rows * columns // 2, rows * columns // BLOCK
        for e, own in enumerate(names):
            scales = Scales(exponents.name, "uint8", (1, BLOCK))
            matrix = Matrix(own, (rows, columns), values.name, "float4_e2m1fn", "rows", scales)
            numbers = replace(values, shape=(rows, columns // 2), offset=values.offset + e * each, nbytes=each)
            powers = replace(
                exponents, shape=(rows, columns // BLOCK), offset=exponents.offset + e * groups, nbytes=groups
            )
            found[values.name].append(Coded(matrix, numbers, powers).meant)
    return found


def _bytes(checkpoint: Checkpoint, stack: str, stored: Stored) -> StoredTensor | None:
    """A tensor of a stack, if it is there as it is stored, its groups apart or not."""
    tensor, (*others, last), group = checkpoint.tensors.get(stack + stored.suffix), stored.shape, stored.group or 1
    fits = tensor is not None and tensor.shape in (stored.shape, (*others, last // group, group))
    return tensor if fits and tensor and tensor.dtype == BY_NAME[stored.dtype].safetensors else None


def _cut(whole: StoredTensor, names: tuple[str, ...], *, turned: bool) -> Iterator[StoredTensor]:
    """A stack as matrices [outputs, inputs], the same number of each expert, one below the other there."""
    experts, first, second = whole.shape
    each, item = len(names) // experts, whole.nbytes // math.prod(whole.shape)
    rows, columns = ((second if turned else first) // each, first if turned else second)
    for i, name in enumerate(names):
        expert, place = divmod(i, each)
        at = expert * first * second + place * rows * (1 if turned else columns)
        yield replace(
            whole,
            name=name,
            shape=(rows, columns),
            offset=whole.offset + at * item,
            nbytes=rows * columns * item,
            turned=second if turned else 0,
        )


def _said(arch: Arch, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config that says that experts lie one by one."""
    outer = outer_of(arch, config)
    if outer is None:
        return {**config, arch.apart: True}
    return {**config, outer.config_key: {**config[outer.config_key], arch.apart: True}}
