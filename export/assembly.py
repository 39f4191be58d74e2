"""How blocks make a model: steps in order, each a block with its values and weights named.

The one description that the stitcher, our PyTorch and the manifest share. A value has one name for the whole
model; a weight is named as in the checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from llmexport.export.errors import ExportError
from llmexport.export.spec import Arch, Block, Model, Port

# What every model takes besides its caches, in this order.
TOKENS = ("input_ids", "position_ids", "attention_mask")
# Paths of the two parameters that may be tied.
HEAD, TABLE = "head.projection.weight", "embedding.weight"


@dataclass(frozen=True)
class Step:
    """One block at its place. `inputs` and `outputs` name the values at the block's ports, in order.

    `path` is where the block's parameters start in the model, as `layers.3.`; Arch.names knows such paths.
    """

    name: str
    block: Block
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    path: str


@dataclass(frozen=True)
class Assembly:
    """A graph of blocks: what goes in, the steps, what comes out. Ports here are named by value."""

    inputs: tuple[Port, ...]
    steps: tuple[Step, ...]
    outputs: tuple[Port, ...]

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The distinct blocks, in order of first use."""
        return tuple(dict.fromkeys(s.block for s in self.steps))


def assemble(model: Model) -> Assembly:
    """The whole model, as `input_ids, position_ids, attention_mask, past` to `logits, present`."""
    context = _context(model)
    steps = [Step("embedding", model.embedding, ("input_ids",), ("hidden.0",), "embedding."), *context.values()]
    past, present = [], []
    for i, layer in enumerate(model.layers):
        mixer = layer.block.mixer
        read = {p.name: v for b in layer.reads for p, v in zip(b.outputs, context[b].outputs, strict=True)}
        cached = tuple(p.name.replace("past_", f"past_key_values.{i}.", 1) for p in mixer.cache)
        grown = tuple(p.name.replace("present_", f"present.{i}.", 1) for p in mixer.present)
        inputs = (f"hidden.{i}", *(read[p.name] for p in mixer.context), *cached)
        steps.append(Step(f"layers.{i}", layer.block, inputs, (f"hidden.{i + 1}", *grown), f"layers.{i}."))
        past += _named(cached, mixer.cache)
        present += _named(grown, mixer.present)
    steps.append(Step("head", model.head, (f"hidden.{len(model.layers)}",), ("logits",), "head."))
    ports = {p.name: p for s in steps if s.block in (model.embedding, *context) for p in s.block.inputs}
    tokens = tuple(ports[n] for n in TOKENS if n in ports)
    return Assembly((*tokens, *past), tuple(steps), (*model.head.outputs, *present))


def _context(model: Model) -> dict[Block, Step]:
    """The blocks that layers read, as steps. A second of a kind without a label of its own is numbered."""
    steps: dict[Block, Step] = {}
    for block in dict.fromkeys(b for layer in model.layers for b in layer.reads):
        twins = sum(b.label == block.label for b in steps)
        suffix = block.label.removeprefix(block.kind) + (f"_{twins}" if twins else "")
        name = block.kind + suffix
        values = tuple(p.name + suffix for p in block.outputs)
        steps[block] = Step(name, block, tuple(p.name for p in block.inputs), values, f"{name}.")
    return steps


def alone(step: Step) -> Assembly:
    """One block as a model of its own; its values carry the names of the block's ports."""
    block = step.block
    inputs, outputs = block.inputs, block.outputs
    own = Step(step.name, block, tuple(p.name for p in inputs), tuple(p.name for p in outputs), step.path)
    return Assembly(inputs, (own,), outputs)


def named_blocks(model: Model) -> dict[str, Step]:
    """Every block that can be exported alone, by name: its kind, and its place where a model has two of a kind."""
    found: dict[str, Step] = {}
    every = [part for step in assemble(model).steps for part in parts(step)]
    places = [part.name.replace(".", "_") for part in every]
    for part, place in zip(every, places, strict=True):
        if part.block in [s.block for s in found.values()]:
            continue
        kind = part.block.kind
        # A block whose place is called like its kind keeps that name, as the mask without a window.
        found[place if kind in found or kind in places else kind] = part
    return found


def find_block(model: Model, name: str) -> Step:
    blocks = named_blocks(model)
    if name not in blocks:
        raise ExportError(f"no block {name!r} in this model, its blocks are: {', '.join(blocks)}, or all")
    return blocks[name]


def checkpoint_name(arch: Arch, model: Model, path: str) -> str:
    """The checkpoint's name of the parameter at `path`, as `layers.3.mlp.up_proj.weight`."""
    return _stored_name(arch, TABLE if model.tied and path == HEAD else path)


def tied_names(arch: Arch) -> tuple[str, str]:
    """What a checkpoint calls the head's projection, and the embedding table that it may be tied to."""
    return _stored_name(arch, HEAD), _stored_name(arch, TABLE)


def part_names(arch: Arch, path: str, experts: int) -> tuple[str, ...]:
    """The checkpoint's names of the matrices that make up the stacked parameter at `path`, expert by expert.

    Empty if the architecture knows no such parts.
    """
    name, index = _generic_name(arch, path)
    matrices = arch.stacks.get(name, ())
    return tuple(p.format(i=index, e=e) for e in range(experts if matrices else 0) for p in matrices)


def _stored_name(arch: Arch, path: str) -> str:
    name, index = _generic_name(arch, path)
    return name.format(i=index)


def _generic_name(arch: Arch, path: str) -> tuple[str, str]:
    """The checkpoint's name of a parameter with {i} for the layer, and the layer.

    Raises KeyError if the architecture names no such path: a mistake in its data file.
    """
    match = re.match(r"layers\.(\d+)\.", path)
    index = match.group(1) if match else ""
    generic = path.replace(f"layers.{index}.", "layers.{i}.", 1)
    starts = [s for s in arch.names if generic.startswith(s)]
    if not starts:
        raise KeyError(f"{path}: no name of this architecture fits")
    start = max(starts, key=len)
    return arch.names[start] + generic[len(start) :], index


def _named(names: tuple[str, ...], ports: tuple[Port, ...]) -> list[Port]:
    return [Port(n, p.shape, p.dtype) for n, p in zip(names, ports, strict=True)]


def parts(step: Step) -> Iterator[Step]:
    """A step and the blocks inside it, outermost first."""
    yield step
    for field, (block, path) in step.block.parts.items():
        yield from parts(Step(f"{step.name}.{field}", block, (), (), f"{step.path}{path}"))
