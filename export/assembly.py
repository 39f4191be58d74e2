"""What an assembly of blocks says: the blocks that can stand alone, and what the checkpoint calls their weights."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator

from llmexport.export.errors import ExportError
from llmexport.export.spec import ONLY, Arch, Assembly, Block, Experts, Graph, Layer, Model, Part, Step

# Paths of the two parameters that may be tied; a base model lacks the first.
HEAD, TABLE = "head.projection.weight", "embedding.weight"


def alone(part: Part) -> Graph:
    """One block as a model of its own; its values carry the names of the block's ports."""
    block = part.block
    inputs, outputs = block.inputs, block.outputs
    own = Step(part.name, block, tuple(p.name for p in inputs), tuple(p.name for p in outputs), part.path)
    carried = {s.past.name: s.present.name for s in block.states}
    return Graph(ONLY, Assembly(inputs, (own,), outputs), carried)


def named_blocks(model: Model) -> dict[str, Part]:
    """Every block that can be exported alone, by name: its kind, and its place where a graph has two of a kind.

    The name of the graph stands before those that two graphs have.
    """
    named: list[tuple[str, str, Part]] = []
    for graph in model.graphs:
        known = {part.block for _, _, part in named}
        named += [(graph.name, name, part) for name, part in _named_in(graph, known).items()]
    times = Counter(name for _, name, _ in named)
    return {f"{graph}_{name}" if times[name] > 1 else name: part for graph, name, part in named}


def _named_in(graph: Graph, known: Collection[Block]) -> dict[str, Part]:
    """The blocks of one graph, without those that are `known` already."""
    every = [part for step in graph.assembly.steps for part in parts(step)]
    places = [part.name.replace(".", "_") for part in every]
    found: dict[str, Part] = {}
    for part, place in zip(every, places, strict=True):
        if part.block in known or part.block in [p.block for p in found.values()]:
            continue
        kind = part.block.kind
        # A block whose place is called like its kind keeps that name, as the mask without a window.
        found[place if kind in found or kind in places else kind] = part
    return found


def find_block(model: Model, name: str) -> Part:
    """The block of this name, or the one at a place of this name."""
    blocks = named_blocks(model)
    found = {s.name: Part(s.name, s.block, s.path) for s in model.steps} | blocks
    if name not in found:
        raise ExportError(f"no block {name!r} in this model, its blocks are: {', '.join(blocks)}")
    return found[name]


def checkpoint_name(arch: Arch, model: Model, path: str) -> str:
    """The checkpoint's name of the parameter at `path`, as `layers.3.mlp.up_proj.weight`."""
    return _stored_name(arch, model.ties.get(path, path))


def tied_names(arch: Arch, model: Model) -> list[tuple[str, str]]:
    """What a checkpoint calls each tied parameter, and the one whose weights it shares."""
    return [(_stored_name(arch, copy), _stored_name(arch, original)) for copy, original in model.ties.items()]


def spare_names(arch: Arch, model: Model) -> tuple[str, ...]:
    """What a checkpoint calls the weights that it may hold and no block reads."""
    every = [part for step in model.steps for part in parts(step)]
    return tuple(checkpoint_name(arch, model, part.path + path) for part in every for path in part.block.spare)


def ahead_names(arch: Arch, model: Model, wanted: Collection[str], held: Collection[str]) -> tuple[str, ...]:
    """What a checkpoint that holds these tensors calls those of its module that guesses ahead, if it has one.

    `wanted` are the names of the model's own.
    """
    layers = sum(isinstance(s.block, Layer) for s in model.steps)
    named = [n.replace("{layers}", str(layers)) for n in arch.ahead]
    if not named or named[0] not in held:
        return ()
    start = arch.ahead[0].partition("{layers}")[0]
    last = f"{start}{layers - 1}."
    return (*named, *(f"{start}{layers}.{n.removeprefix(last)}" for n in wanted if n.startswith(last)))


def head_name(arch: Arch) -> str:
    """What a checkpoint calls the head's projection."""
    return _stored_name(arch, HEAD)


def older_name(arch: Arch, name: str) -> str:
    """What the checkpoints of old releases call a tensor: mostly the same."""
    return next((name.removesuffix(end) + old for end, old in arch.older.items() if name.endswith(end)), name)


def renamed(arch: Arch, rename: Callable[[str], str]) -> Arch:
    """The architecture whose tensors another layout calls otherwise."""
    return dataclasses.replace(
        arch,
        names={path: rename(n) for path, n in arch.names.items()},
        stacks={rename(n): tuple(map(rename, names)) for n, names in arch.stacks.items()},
        ignore=tuple(map(rename, arch.ignore)),
        ahead=tuple(map(rename, arch.ahead)),
    )


def has_own_head(arch: Arch) -> bool:
    """Whether a base model lacks more of the head than the projection, which may be its table of words."""
    head = HEAD.partition(".")[0] + "."
    beside = [n for path, n in arch.names.items() if path.startswith(head) and not HEAD.startswith(path)]
    return not all(n.startswith(arch.base) for n in beside)


def transposed(step: Step) -> set[str]:
    """The paths of stacks that no matrices of single experts make up, as those are [outputs, inputs]."""
    experts = [(p.path, p.block) for p in parts(step) if isinstance(p.block, Experts)]
    return {path + name for path, block in experts if block.transposed for name in block.sizes}


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
    match = re.search(r"\.(\d+)\.", path)
    index = match.group(1) if match else ""
    generic = path.replace(f".{index}.", ".{i}.", 1) if match else path
    starts = [s for s in arch.names if generic.startswith(s)]
    if not starts:
        raise KeyError(f"{path}: no name of this architecture fits")
    start = max(starts, key=len)
    return arch.names[start] + generic[len(start) :], index


def parts(of: Step | Part) -> Iterator[Part]:
    """A step's block and the blocks inside it, outermost first."""
    yield Part(of.name, of.block, of.path)
    for field, (block, path) in of.block.parts.items():
        yield from parts(Part(f"{of.name}.{field}", block, f"{of.path}{path}"))
