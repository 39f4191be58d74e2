"""Writes a seeded random checkpoint in the published layout: config, sharded safetensors, index."""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  teaches np.dtype "bfloat16"
import numpy as np
from safetensors.numpy import save_file

from llmexport.export import archs, weights
from llmexport.export.assembly import checkpoint_name, part_names, parts, transposed
from llmexport.export.checkpoint import INDEX, SINGLE
from llmexport.export.earlier import RANDOM
from llmexport.export.errors import ExportError
from llmexport.export.multimodal import tiny_config, tiny_files, with_part
from llmexport.export.onnx_file import read_model
from llmexport.export.output import new_folder
from llmexport.export.spec import ANY_FLOAT, Arch, Attention, Block, DeltaTimeMix, GatedNorm, Layer, Norm, Router
from llmexport.export.wanted import load_parameters
from llmexport.export.weight_layout import unplaced, write_holes
from llmexport.plugins.dtypes import BY_NAME

MOST_TENSORS = 2**18  # the largest published models have a quarter of that
MOST_BYTES = 2**44  # seven times the largest published models in fp32
ROWS = 2**22  # values drawn at a time: what bounds the memory beyond one shard


def write(
    arch: Arch,
    target: Path,
    *,
    config: Mapping[str, Any] | None = None,
    dtype: str = "bfloat16",
    seed: int = 0,
    shard_bytes: int = 2**30,
    hollow: bool = False,
    part: str | None = None,
    force: bool = False,
) -> None:
    """A checkpoint of `config` (the architecture's tiny one if None) that transformers loads as well.

    Matrices are normal with a deviation that keeps the logits of order one; norms and biases are spread too, so
    that leaving one out shows. The same seed gives the same bytes. Holds one shard in memory. `hollow`: the files are
    holes that read as zeros and take no space, of any size. `part` of a multimodal checkpoint: all of it where `config`
    is one's and nobody says; the tiny one is of the text model, or has a tokenizer and a processor as well.
    """
    part = part or ("text" if config is None else "all")
    beside: Mapping[str, str] = {}
    if config is None and part != "text":
        config, beside = tiny_config(arch, part), tiny_files(arch)
        arch = archs.choose(None, config)
    config = {
        "architectures": [arch.reference.model_class],
        "model_type": arch.model_types[0],
        "dtype": dtype,
    } | dict(config or arch.tiny)
    parameters: dict[str, _Parameter] = {}
    for name, parameter in _parameters(arch, config, dtype, part):
        parameters[name] = parameter
        if len(parameters) > MOST_TENSORS:
            raise ExportError(
                f"the config asks for more than {MOST_TENSORS} tensors: are its numbers of layers and experts meant?"
            )
    _check_room(target, sum(p.nbytes for p in parameters.values()), hollow)
    shards = _split(parameters, shard_bytes)
    with new_folder(target, force=force, marker=RANDOM) as folder:
        index: dict[str, str] = {}
        for i, names in enumerate(shards):
            # An index of no tensor is a damaged one.
            file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors" if names else SINGLE
            if hollow:
                held = ((n, parameters[n]) for n in names)
                write_holes(folder / file, [unplaced(n, BY_NAME[p.dtype], p.shape) for n, p in held])
            else:
                tensors = {n: _draw(n, parameters[n], seed) for n in names}
                save_file(tensors, folder / file, metadata={"format": "pt"})
            index |= dict.fromkeys(names, file)
        (folder / RANDOM).write_text(json.dumps({"made_by": "llmexport", "seed": seed}))
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        for name, text in beside.items():
            (folder / name).write_text(text)
        if index:
            (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}, indent=2))


@dataclass(frozen=True)
class _Parameter:
    """What to draw: numbers about `mean`, or evenly from `usual`."""

    shape: tuple[int, ...]
    dtype: str
    mean: float
    usual: tuple[float, float] | None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BY_NAME[self.dtype].bits // 8


def _parameters(arch: Arch, config: Mapping[str, Any], dtype: str, part: str) -> Iterator[tuple[str, _Parameter]]:
    """Name in the checkpoint of every parameter, and what it is."""
    model, arch = read_model(arch, config, part=part), with_part(arch, config, part)
    stored_as = {block: load_parameters(block) for block in {s.block for s in model.steps}}
    for step in model.steps:
        # What a block says of the blocks inside it counts.
        every, whole = reversed([*parts(step)]), transposed(step)
        means = {part.path + path: mean for part in every for path, mean in _means(part.block).items()}
        for path, tensor in stored_as[step.block].items():
            full, shape = step.path + path, tensor.shape
            mean = means.get(full, 0.0)
            names = part_names(arch, full, shape[0]) if arch.in_parts and full not in whole else ()
            wanted = weights.Parameter(checkpoint_name(arch, model, full), shape, names, group=tensor.group)
            kind = dtype if tensor.dtype in ANY_FLOAT else tensor.dtype
            for name in wanted.sources:
                yield name, _Parameter(wanted.grouped_shape, kind, mean, tensor.usual)


def _means(block: Block) -> dict[str, float]:
    """About what the weights of a norm, and others that multiply what is there, lie, by their paths in the block."""
    match block:
        case Norm():
            return {"weight": 1.0 - block.offset}
        case GatedNorm():
            return {"weight": 1.0}
        case Attention(scale=1.0, qk_norm=Norm() as norm):
            # The norm of q has the scale that there is not: larger logits make 16 bits a toss.
            return {"q_norm.weight": block.head_size**-0.5 - norm.offset}
        case DeltaTimeMix():
            return {"k_k": 1.0, "k_a": 1.0, "g_norm.weight": 1.0}
        case Layer():
            return {"layer_scalar": 1.0}
        case Router():
            return {"expert_scale": 1.0}
    return {}


def _check_room(target: Path, size: int, hollow: bool) -> None:
    """Refuses to fill the disk, of which a hollow checkpoint takes nothing, and sizes that no model has."""
    if size > MOST_BYTES:
        raise ExportError(
            f"the config asks for {size / 1e12:.0f} TB of weights, at most {MOST_BYTES / 1e12:.0f} are written"
        )
    parent = next(p for p in target.absolute().parents if p.is_dir())
    free = shutil.disk_usage(parent).free
    if size > free and not hollow:
        raise ExportError(
            f"the weights would take {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free in {parent}: --hollow takes none"
        )


def _split(parameters: Mapping[str, _Parameter], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    room = limit
    for name, parameter in parameters.items():
        if shards[-1] and parameter.nbytes > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= parameter.nbytes
    return shards


def _draw(name: str, parameter: _Parameter, seed: int) -> np.ndarray:
    random = np.random.default_rng([seed, zlib.crc32(name.encode())])
    shape, dtype = parameter.shape, np.dtype(parameter.dtype)
    if parameter.usual:
        low, high = parameter.usual
        if np.issubdtype(dtype, np.integer):
            return random.integers(int(low), int(high), shape, dtype)
        return random.uniform(low, high, shape).astype(dtype)
    deviation = 0.2 if len(shape) == 1 else 0.6 * shape[-1] ** -0.5
    values = np.empty(math.prod(shape), dtype)
    for start in range(0, values.size, ROWS):
        part = random.standard_normal(min(ROWS, values.size - start), np.float32)
        values[start : start + ROWS] = part * deviation + parameter.mean
    return values.reshape(shape)
