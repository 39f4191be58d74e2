"""Experts that a checkpoint has in few bits, one by one or in one tensor: how MoeExperts reads them all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Set
from typing import NamedTuple, TypeVar

from llmexport.export.assembly import checkpoint_name, part_names
from llmexport.export.checkpoint import Checkpoint
from llmexport.export.errors import ExportError
from llmexport.export.packed.matrix import EXPONENTS, Matrix
from llmexport.export.packed.repack import has_zeros, places_of
from llmexport.export.quantised import CURE
from llmexport.export.spec import Arch, Assembly, Block, Experts, Layer, Model, Packed, Plain
from llmexport.export.values import show_name
from llmexport.graphs import lower_experts
from llmexport.plugins.packed_formats import PACKED

Kept = TypeVar("Kept", bound=Block)
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
    """The model whose experts are read as they lie: in few bits, where the checkpoint has those of a layer in one way,
    and [outputs, inputs] where it has them one by one.

    Stacks that ONNX Runtime's operator for experts in int4 takes are to be written as that reads them. Raises
    ExportError on experts that are quantised in one tensor and are not read so.
    """
    join, held = (target, dtype) == ("onnxruntime", "float32"), checkpoint.names

    def read(block: Experts, path: str) -> Experts:
        stacks = {n: s for n in block.sizes if (s := checkpoint_name(arch, model, path + n)) in held}
        if block.transposed and not stacks and _lies_apart(block, arch, path, held):
            block = dataclasses.replace(block, transposed=False)
        if not checkpoint.matrices:
            return block
        if stacked := [n for n in stacks.values() if n in checkpoint.matrices]:
            _check_stacks(block, stacks, checkpoint)
        storage = _storage(block, arch, path, checkpoint, stacks if stacked else {})
        if stacked and not storage:
            raise _wrong(stacked[0], "the matrices of this layer's experts are quantised in more than one way")
        if storage and join and _is_lowered(block, storage):
            joined = dataclasses.replace(storage, join=1 if block.interleaved else 2)
            return dataclasses.replace(block, storage=joined, interleaved=True)
        return dataclasses.replace(block, storage=storage, transposed=False) if storage else block

    graphs = (dataclasses.replace(g, assembly=with_experts(g.assembly, read)) for g in model.graphs)
    return dataclasses.replace(model, graphs=tuple(graphs))


def with_experts(assembly: Assembly, change: Callable[[Experts, str], Experts]) -> Assembly:
    """The assembly with what `change` makes of each block of experts, which it is given with its path."""
    return with_blocks(assembly, Experts, change)


def with_blocks(assembly: Assembly, kind: type[Kept], change: Callable[[Kept, str], Kept]) -> Assembly:
    """The assembly with what `change` makes of each block of one kind, which it is given with its path."""

    def within(block: Block, path: str) -> Block:
        if isinstance(block, kind):
            return change(block, path)
        # Some blocks are made when they are asked for.
        changed = {n: new for n, (part, own) in block.parts.items() if (new := within(part, path + own)) is not part}
        if changed and isinstance(block, Layer):
            own = (dataclasses.replace(s, block=changed.get(s.name, s.block)) for s in block.sublayers)
            return dataclasses.replace(block, sublayers=tuple(own))
        return dataclasses.replace(block, **changed) if changed else block

    steps = tuple(dataclasses.replace(s, block=within(s.block, s.path)) for s in assembly.steps)
    return dataclasses.replace(assembly, steps=steps)


def _lies_apart(block: Experts, arch: Arch, path: str, held: Set[str]) -> bool:
    """Whether these are the names of tensors that hold its experts' matrices one by one."""
    each = [part_names(arch, path + name, block.experts) for name in block.sizes]
    return all(names and held >= {*names} for names in each)


def _is_lowered(block: Experts, storage: Packed) -> bool:
    """Whether lower_experts takes them, as far as the model tells, and no biases of gate and up lie apart."""
    other = (block.bias and not block.interleaved) or block.scale_input or storage.factors
    return storage.format == "uint4" and block.activation in lower_experts.ACTIVATIONS and not other


def _check_stacks(block: Experts, stacks: Mapping[str, str], checkpoint: Checkpoint) -> None:
    """Raises ExportError unless all matrices lie quantised in one tensor each, as the unquantised ones would lie."""
    for name, (rows, columns) in block.sizes.items():
        stack = stacks.get(name, "")
        if not (matrix := checkpoint.matrices.get(stack)):
            quantised = next(s for s in stacks.values() if s in checkpoint.matrices)
            held = checkpoint.tensors.get(stack)
            lies = f"{show_name(stack)} is {held.dtype} without scales" if held else f"its {name} is not there"
            raise _wrong(quantised, f"{lies}, and all matrices of an expert are quantised or none is")
        shape = (block.experts, *((columns, rows) if block.transposed else (rows, columns)))
        if (matrix.layout == "stacked") is not block.transposed:
            ways = ("[experts, outputs, inputs]", "[experts, inputs, outputs]")
            has, wants = ways[:: -1 if matrix.layout == "stacked" else 1]
            raise _wrong(stack, f"such scales are of {has}, and this model's experts are {wants}")
        if matrix.unquantised != shape:
            raise _wrong(stack, f"it is {list(matrix.unquantised)} once unpacked, config.json makes it {list(shape)}")


def _wrong(stack: str, what: str) -> ExportError:
    return ExportError(f"{show_name(stack)} is quantised in a way that is not read here: {what}: {CURE}")


def _storage(block: Experts, arch: Arch, path: str, checkpoint: Checkpoint, stacks: Mapping[str, str]) -> Packed | None:
    """None of what the op does not read. `stacks` are the names of matrices that lie in one tensor each."""
    if block.storage != Plain():
        return None
    kinds: dict[str, set[Kind | None]] = {}
    matrices: list[Matrix] = []
    for name, (rows, columns) in block.sizes.items():
        names = (stacks[name],) if stacks else part_names(arch, path + name, block.experts)
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
