"""How blocks make a model: steps in order, each a block with its values and weights named.

The one description that the stitcher, our PyTorch and the manifest share. A value has one name for the whole
model; a weight is named as in the checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from llmexport.export.errors import ExportError
from llmexport.export.spec import Arch, Block, Mask, Model, Port

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
    masks = {w: Mask(w) for w in dict.fromkeys(model.windows)}
    mask_names = {w: "mask" if w is None else f"mask_window_{w}" for w in masks}
    steps = [
        Step("embedding", model.embedding, ("input_ids",), ("hidden.0",), "embedding."),
        Step("rotary", model.rotary, ("position_ids",), ("cos", "sin"), "rotary."),
    ]
    for window, mask in masks.items():
        name = mask_names[window]
        steps.append(Step(name, mask, ("attention_mask", "position_ids"), (name,), f"{name}."))
    past, present = [], []
    for i, (layer, window) in enumerate(zip(model.layers, model.windows, strict=True)):
        cached = (f"past_key_values.{i}.key", f"past_key_values.{i}.value")
        grown = (f"present.{i}.key", f"present.{i}.value")
        inputs = (f"hidden.{i}", "cos", "sin", mask_names[window], *cached)
        steps.append(Step(f"layers.{i}", layer, inputs, (f"hidden.{i + 1}", *grown), f"layers.{i}."))
        past += _named(cached, layer.attention.cache)
        present += _named(grown, layer.attention.present)
    steps.append(Step("head", model.head, (f"hidden.{len(model.layers)}",), ("logits",), "head."))
    ids, positions = model.embedding.inputs[0], model.rotary.inputs[0]
    mask = Mask().inputs[0]
    return Assembly((ids, positions, mask, *past), tuple(steps), (*model.head.outputs, *present))


def alone(step: Step) -> Assembly:
    """One block as a model of its own; its values carry the names of the block's ports."""
    block = step.block
    inputs, outputs = block.inputs, block.outputs
    own = Step(step.name, block, tuple(p.name for p in inputs), tuple(p.name for p in outputs), step.path)
    return Assembly(inputs, (own,), outputs)


def named_blocks(model: Model) -> dict[str, Step]:
    """Every block that can be exported alone, by name: its kind, and its place where a model has two of a kind."""
    found: dict[str, Step] = {}
    for step in assemble(model).steps:
        for part in _parts(step):
            if part.block in [s.block for s in found.values()]:
                continue
            name = part.block.kind if part.block.kind not in found else part.name.replace(".", "_")
            found[name] = part
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


def _stored_name(arch: Arch, path: str) -> str:
    """Raises KeyError if the architecture names no such path: a mistake in its data file."""
    match = re.match(r"layers\.(\d+)\.", path)
    index = match.group(1) if match else ""
    generic = path.replace(f"layers.{index}.", "layers.{i}.", 1)
    starts = [s for s in arch.names if generic.startswith(s)]
    if not starts:
        raise KeyError(f"{path}: no name of this architecture fits")
    start = max(starts, key=len)
    return arch.names[start].format(i=index) + generic[len(start) :]


def _named(names: tuple[str, ...], ports: tuple[Port, ...]) -> list[Port]:
    return [Port(n, p.shape, p.dtype) for n, p in zip(names, ports, strict=True)]


def _parts(step: Step) -> Iterator[Step]:
    """A step and the blocks inside it, outermost first."""
    yield step
    for field, path in PARTS.get(step.block.kind, {}).items():
        block = getattr(step.block, field)
        yield Step(f"{step.name}.{field}", block, (), (), f"{step.path}{path}")


# Where a block's inner blocks keep their parameters: kind -> field of the spec -> path in the module.
PARTS = {
    "decoder_layer": {
        "input_norm": "input_layernorm.",
        "attention": "self_attn.",
        "post_attention_norm": "post_attention_layernorm.",
        "mlp": "mlp.",
    },
    "head": {"norm": "norm."},
}
