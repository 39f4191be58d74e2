"""What a model wants of its checkpoint, known before anything is traced."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from fnmatch import fnmatch

from llmexport.export import cache, weights
from llmexport.export.assembly import (
    ahead_names,
    alone,
    checkpoint_name,
    find_block,
    head_name,
    older_name,
    part_names,
    spare_names,
    tied_names,
    transposed,
)
from llmexport.export.checkpoint import Checkpoint
from llmexport.export.errors import ExportError
from llmexport.export.multimodal import tower_tensors
from llmexport.export.spec import Arch, Assembly, Block, Graph, Model, Stored, to_data
from llmexport.export.tied import check_tied
from llmexport.export.values import show_name
from llmexport.export.weights import Parameter

SPARE = 1000  # tensors that may be missing beyond as many as there are, and are still counted one by one


def wanted_parameters(
    arch: Arch, checkpoint: Checkpoint, model: Model, assembly: Assembly
) -> dict[str, dict[str, Parameter]]:
    """The weights of every step by the path in its block: what the checkpoint calls each, whole or in parts.

    Raises ExportError if the config asks for far more tensors than there are, before their names are made.
    """
    stored = checkpoint.names
    stored_as = {block: load_parameters(block) for block in assembly.blocks}
    found: dict[str, dict[str, Parameter]] = {}
    most = SPARE + 2 * len(stored)
    names = 0
    for step in assembly.steps:
        own, whole = found.setdefault(step.name, {}), transposed(step)
        for path, tensor in stored_as[step.block].items():
            name, shape = checkpoint_name(arch, model, step.path + path), tensor.shape
            name = next((n for n in (name, older_name(arch, name)) if n in stored), name)
            matrix = (step.path + path).removesuffix(tensor.suffix if tensor.role else "")
            experts = min(shape[0], most) if shape else 0
            parts = () if name in stored or matrix in whole else part_names(arch, matrix, experts)
            if tensor.role and (stack := checkpoint_name(arch, model, matrix)) in checkpoint.matrices:
                name, parts = f"{stack}/{tensor.role}", (stack,)
            elif tensor.anew and name in stored:
                name, parts = f"{name}/anew", (name,)
            how = (tensor.dtype, tensor.group, tensor.role, tensor.join, tensor.turned)
            own[path] = Parameter(name, shape, parts, *how)
            names += len(own[path].sources)
            if names > most:
                raise ExportError(
                    f"config.json asks for more than {most} tensors, as {show_name(own[path].sources[-1])}, "
                    f"the checkpoint holds {len(stored)}: is config.json from the same model, and is every shard there?"
                )
    return found


def wanted_graphs(
    arch: Arch, checkpoint: Checkpoint, model: Model, block: str | None
) -> tuple[tuple[Graph, ...], dict[str, dict[str, dict[str, Parameter]]], list[Parameter]]:
    """The graphs of a model, or of the one block of this name; by their names what wanted_parameters gives; and all
    weights."""
    graphs = model.graphs if block is None else (alone(find_block(model, block)),)
    own = {g.name: wanted_parameters(arch, checkpoint, model, g.assembly) for g in graphs}
    return graphs, own, [p for steps in own.values() for parameters in steps.values() for p in parameters.values()]


def tensor_names(
    own: Mapping[str, Mapping[str, Parameter]],
) -> dict[str, dict[str, str | tuple[str, ...]]]:
    """By step and by the path in its block, the tensor that a weight lies in, or those that it is made of."""
    return {step: {path: p.parts or p.name for path, p in parameters.items()} for step, parameters in own.items()}


def whole(parameters: Mapping[str, Parameter], checkpoint: Checkpoint) -> dict[str, Parameter]:
    """The same, each that a checkpoint now holds in one tensor as that."""
    held = checkpoint.tensors
    return {
        n: replace(p, parts=(), role="", join=0, turned=False) if p.name in held else p for n, p in parameters.items()
    }


def check_layers(arch: Arch, model: Model, tensors: Collection[str], tower: tuple[str, ...]) -> None:
    """Raises ExportError if a checkpoint of these tensors holds fewer layers than its config says, or no tower.

    `tower` are patterns of the tensors of one that is wanted.
    """
    if tower and not any(fnmatch(n, p) for n in tensors for p in tower):
        raise ExportError(f"the checkpoint holds no vision tower ({', '.join(tower)}): pass --part text")
    for ours, theirs in {(k.partition("{i}")[0], v.partition("{i}")[0]) for k, v in arch.names.items() if "{i}" in k}:
        # A layer may be placed in several graphs.
        layers = {s.path.removeprefix(ours).partition(".")[0] for s in model.steps if s.path.startswith(ours)}
        held = {n.removeprefix(theirs).partition(".")[0] for n in tensors if n.startswith(theirs)}
        if held and len(layers) > len(held):
            of_tower = any(fnmatch(theirs, p) for p in tower)
            raise ExportError(
                f"config.json says {'that the tower has layers:' if of_tower else 'num_hidden_layers'} {len(layers)}, "
                f"the checkpoint holds {len(held)} layers: is config.json from the same model?"
            )


def load_parameters(block: Block) -> dict[str, Stored]:
    """Path of every parameter of a block -> what holds it."""

    def make() -> bytes:
        from llmexport.export.trace import module_shapes

        return json.dumps(module_shapes(block)).encode()

    shapes = json.loads(cache.cached("parameters", to_data(block), make))
    return {path: Stored("", tuple(shape)) for path, shape in shapes.items()} | dict(block.stored)


def load_matrices(block: Block) -> list[str]:
    """Paths of the weights [out, in] by which Linear layers of a block multiply."""

    def make() -> bytes:
        from llmexport.export.blocks import matrices

        return json.dumps(matrices(block)).encode()

    found: list[str] = json.loads(cache.cached("matrices", to_data(block), make))
    return found


def check_weights(
    arch: Arch, checkpoint: Checkpoint, model: Model, wanted: Collection[Parameter], part: str, *, whole: bool
) -> None:
    """Raises ExportError unless the checkpoint holds what the graphs want, and, of a whole model, nothing that they
    leave unsaid."""
    ignore = arch.ignore + spare_names(arch, model)
    ignore += ahead_names(arch, model, [n for p in wanted for n in p.sources], checkpoint.tensors)
    for copy, original in tied_names(arch, model):
        ignore += (copy,) if check_tied(copy, original, checkpoint) else ()
    tower = tower_tensors(arch, checkpoint.config, part)
    weights.check({p.name: p for p in wanted}, checkpoint, ignore, whole, head_name(arch), tower)
