"""Experts that a checkpoint has one by one in few bits: how MoeExperts reads them all."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from llmexport.export.assembly import part_names
from llmexport.export.checkpoint import Checkpoint
from llmexport.export.packed.matrix import EXPONENTS, Matrix
from llmexport.export.packed.repack import has_zeros, places_of
from llmexport.export.spec import Arch, Block, Experts, Layer, Model, Packed, Plain
from llmexport.graphs import lower_experts
from llmexport.plugins.packed_formats import PACKED

FORMATS = {"uint4": "uint4", "int4": "uint4", "uint8": "uint8", "int8": "int8"}


class Kind(NamedTuple):
    """What the matrices of a stack have in common."""

    format: str
    group: int
    rows: int
    factors: bool
    divides: bool
    scales: str


def with_packed(
    model: Model, arch: Arch, checkpoint: Checkpoint, target: str = "portable", dtype: str = "float32"
) -> Model:
    """The model whose experts are read in few bits, where the checkpoint has those of a layer in one way.

    Stacks that ONNX Runtime's operator for experts in int4 takes are to be written as that reads them.
    """
    if not checkpoint.matrices:
        return model
    join = (target, dtype) == ("onnxruntime", "float32")

    def within(block: Block, path: str) -> Block:
        if isinstance(block, Experts):
            storage = _storage(block, arch, path, checkpoint)
            if storage and join and _is_lowered(block, storage):
                return dataclasses.replace(block, storage=dataclasses.replace(storage, join=True), interleaved=True)
            return dataclasses.replace(block, storage=storage) if storage else block
        # Some blocks are made when they are asked for.
        changed = {n: new for n, (part, own) in block.parts.items() if (new := within(part, path + own)) is not part}
        if changed and isinstance(block, Layer):
            own = (dataclasses.replace(s, block=changed.get(s.name, s.block)) for s in block.sublayers)
            return dataclasses.replace(block, sublayers=tuple(own))
        return dataclasses.replace(block, **changed) if changed else block

    graphs = []
    for graph in model.graphs:
        steps = tuple(dataclasses.replace(s, block=within(s.block, s.path)) for s in graph.assembly.steps)
        graphs.append(dataclasses.replace(graph, assembly=dataclasses.replace(graph.assembly, steps=steps)))
    return dataclasses.replace(model, graphs=tuple(graphs))


def _is_lowered(block: Experts, storage: Packed) -> bool:
    """Whether lower_experts takes them, as far as the model tells; biases are those of gate and up apart."""
    apart = block.bias or block.scale_input or storage.factors
    return storage.format == "uint4" and block.activation in lower_experts.ACTIVATIONS and not apart


def _storage(block: Experts, arch: Arch, path: str, checkpoint: Checkpoint) -> Packed | None:
    if block.transposed or block.storage != Plain():
        return None
    kinds: dict[str, set[Kind | None]] = {}
    matrices: list[Matrix] = []
    for name, (rows, columns) in block.sizes.items():
        names = part_names(arch, path + name, block.experts)
        found = [m for n in names if (m := checkpoint.matrices.get(n))]
        if not names or len(found) < len(names):
            return None
        shape = (rows * block.experts // len(names), columns)
        kinds[name] = {_kind(m, checkpoint) if m.shape == shape else None for m in found}
        matrices += found
    up, down = (next(iter(k)) if len(k) == 1 else None for k in kinds.values())
    if not up or not down or up._replace(rows=0, group=0) != down._replace(rows=0, group=0):
        return None
    # One scale a row is a group of any size that a row fits in.
    group = max(up.group, down.group)
    if up.group != down.group and (up.group < block.hidden or down.group < block.intermediate):
        return None
    return Packed(up.format, group, up.factors, any(has_zeros(m, checkpoint.read) for m in matrices))


def _kind(matrix: Matrix, checkpoint: Checkpoint) -> Kind | None:
    """None of one that the op does not read."""
    said, (rows, columns) = matrix.scales, matrix.shape
    tall = min(said.block[0], rows)
    if matrix.factor or rows % tall or columns * matrix.bits % 8 or places_of(matrix, checkpoint.read) is not None:
        return None
    exponents = said.dtype in EXPONENTS
    if matrix.number == "float4_e2m1fn":
        form = "mxfp4" if exponents else "nvfp4"
        fits = said.block == (1, PACKED[form].group)
    elif matrix.number == "float8_e4m3fn":
        form = "mxfp8" if exponents and said.block == (1, PACKED["mxfp8"].group) else "fp8"
        fits = True
    else:
        form, fits = FORMATS.get(matrix.number, ""), not exponents
    if not form or not fits:
        return None
    return Kind(form, said.block[1], tall, said.second is not None, said.divides, said.dtype)
