"""Quantises a checkpoint on its way into an export, which then holds a checkpoint in compressed-tensors' layout."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from llmexport.export import rounded_files
from llmexport.export.assembly import HEAD, head_name, parts, tied_names
from llmexport.export.checkpoint import INDEX, Checkpoint, read_header
from llmexport.export.coded import can_be_floats
from llmexport.export.errors import ExportError
from llmexport.export.handover import HandOver
from llmexport.export.identity import Held, WeightFile
from llmexport.export.multimodal import outer_of, tower_tensors
from llmexport.export.packed.read import matrices_of
from llmexport.export.packed.scheme import MXFP4, said_in
from llmexport.export.placing import CONFIG, check_space
from llmexport.export.progress import Progress
from llmexport.export.rounding import GROUPS, ROUNDINGS, Rounding
from llmexport.export.spec import Arch, Experts, Graph, Model, Step
from llmexport.export.tied import check_tied
from llmexport.export.values import show_name
from llmexport.export.wanted import load_matrices
from llmexport.export.weights import Parameter

Own = Mapping[str, Mapping[str, Mapping[str, Parameter]]]  # by graph, by step, by the path in its block
WEIGHT, TIED = ".weight", "tie_word_embeddings"
QUANTISED = "the checkpoint is quantised, and is exported as it is: leave --quantize out, or take the model in 16 bits"


@dataclass(frozen=True)
class Quantised:
    """The `checkpoint` as an export will hold it: `files` has its weights, `told` what else is another than before."""

    source: Checkpoint
    checkpoint: Checkpoint
    rounding: Rounding
    files: tuple[rounded_files.File, ...]
    told: HandOver

    def write(self, folder: Path, whole: bool, progress: Progress) -> list[tuple[WeightFile, Held]]:
        """Writes the weights into a folder that has none; a chunk of a tensor is in memory."""
        return rounded_files.write(self.files, self.source, self.rounding, folder, whole, progress)

    def written(self, folder: Path) -> Checkpoint:
        """The checkpoint whose weights were written into this folder."""
        return replace(
            self.checkpoint, folder=folder, shards=tuple(read_header(folder / f.name)[1] for f in self.files)
        )


def check(
    kind: str | None, size: int | None, head: bool, checkpoint: Checkpoint, block: str | None, weights: str, part: str
) -> None:
    """Raise ExportError unless a checkpoint can be quantised so, where these are the other options of an export."""
    if kind is None:
        if head:
            raise ExportError("--quantize-head rounds as --quantize does: pass both, or neither")
        if size is not None:
            raise ExportError("--group-size is that of --quantize int4: pass both, or neither")
        return
    if kind not in ROUNDINGS:
        raise ExportError(f"quantize is {kind!r}: choose one of {', '.join(ROUNDINGS)}")
    if size is not None and not ROUNDINGS[kind].packs:
        raise ExportError(f"--group-size is that of int4, {kind} has a scale for each row: leave it out")
    if size not in (None, *GROUPS):
        raise ExportError(f"group_size is {size!r}: choose one of {', '.join(map(str, GROUPS))}")
    odd = {f"--block {block}": block, f"--weights {weights}": weights != "auto", "--part vision": part == "vision"}
    if others := [said for said, there in odd.items() if there]:
        raise ExportError(f"--quantize writes all weights of a text model anew, not {others[0]}: leave one of them out")
    # What is published in FP8 or MXFP4 may have no other form.
    said = said_in(checkpoint.config)
    if not can_be_floats(checkpoint) if checkpoint.matrices else said and said.get("quant_method") != MXFP4:
        stacks = [m.name for m in checkpoint.matrices.values() if m.experts]
        also = f", or with experts one by one, not as in {show_name(stacks[0])}" if stacks else ""
        raise ExportError(f"{QUANTISED}{also}")


def untied(arch: Arch, model: Model, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint of a model whose head is its table, as one of a model whose head is its own, of the same bytes."""
    copies = {}
    for copy, original in tied_names(arch, model):
        if not check_tied(copy, original, checkpoint):
            copies[copy] = replace(checkpoint.tensors[original], name=copy)
    config, outer = {**checkpoint.config, TIED: False}, outer_of(arch, checkpoint.config)
    if outer and TIED in (inner := config.get(outer.config_key, {})):
        config[outer.config_key] = {**inner, TIED: False}
    return replace(checkpoint, config=config, tensors={**checkpoint.tensors, **copies})


def check_untied(arch: Arch, tied: Model, own: Model) -> None:
    """Raise ExportError unless a model computes the same whether its head is its table or a copy of that."""
    if own.ties or own.graphs != tied.graphs:
        raise ExportError(f"--quantize-head: the head of {arch.name} is its table of words alone: leave it out")


def quantise(
    kind: str,
    size: int | None,
    head: bool,
    arch: Arch,
    checkpoint: Checkpoint,
    graphs: Iterable[Graph],
    own: Own,
    folder: Path,
) -> Quantised:
    """Plans the checkpoint in `folder` of which matrices of products are rounded, in groups of `size` columns if int4.

    A vision tower is not rounded, and without `head` the head is not. Raises ExportError if there is nothing to round,
    or no space.
    """
    if said_in(checkpoint.config):
        # Who takes experts apart has found none in MXFP4.
        raise ExportError(QUANTISED)
    rounding = ROUNDINGS[kind]
    wanted, tower = size or GROUPS[0], tower_tensors(arch, checkpoint.config, "all")
    found = [p for p in matrices(graphs, own, head) if not any(fnmatch(n, t) for n in p.sources for t in tower)]
    fits = {p.name: _group_size(rounding, wanted, p.part_shape[1]) for p in found}
    if rounding.packs and (of_experts := [fit for p in found if p.parts and (fit := fits[p.name])]):
        # MoeExperts has one size for all.
        fits |= {p.name: min(of_experts) for p in found if p.parts and fits[p.name]}
    sizes = {n: fit for p in found if (fit := fits[p.name]) for n in p.sources}
    if not sizes:
        has = f"{arch.name} has no linear layer here whose weight [out, in] can be rounded so"
        raise ExportError(f"--quantize {kind}: {has}: leave it out")
    if head and head_name(arch) not in sizes:
        raise ExportError(f"--quantize-head: {arch.name} has no head here that can be rounded so: leave it out")
    limit = max(s.nbytes for s in checkpoint.shards)
    files = rounded_files.planned(checkpoint.tensors.values(), sizes, rounding, limit)
    tensors = {t.name: t for f in files for p in f.pieces for t in p.tensors}
    total = sum(t.nbytes for t in tensors.values())
    check_space(folder, total, "write", "free space, or choose another disk")
    said = _said(rounding, sizes, checkpoint, head_name(arch))
    config = {**checkpoint.config, "quantization_config": said}
    told = {CONFIG: config}
    if len(files) > 1:
        told[INDEX] = {"metadata": {"total_size": total}, "weight_map": {n: t.file for n, t in tensors.items()}}
    written = {name: f"{json.dumps(data, indent=2)}\n".encode() for name, data in told.items()}
    notes = [*_notes(kind, wanted, found, fits, own, checkpoint, tower)]
    if left := [n for n, t in checkpoint.tensors.items() if t.coded and n not in sizes]:
        notes.append(f"{kind}: {_some(left)} is written in bfloat16: it was in few bits, and is not rounded")
    packed = matrices_of(config, checkpoint.folder, tensors)
    made = replace(checkpoint, config=config, tensors=tensors, shards=(), matrices=packed)
    return Quantised(checkpoint, made, rounding, files, HandOver(written, tuple(notes)))


def matrices(graphs: Iterable[Graph], own: Own, head: bool) -> list[Parameter]:
    """The parameters by which Linear layers and experts multiply, each of matrices [outputs, inputs] in the checkpoint.

    Without those of one output, which are gates, those whose numbers are read otherwise as well, and the head unless
    it is asked for.
    """
    found: dict[str, Parameter] = {}
    others: set[str] = set()
    for graph in graphs:
        paths = {block: load_matrices(block) for block in graph.assembly.blocks}
        for step in graph.assembly.steps:
            multiply = {path for path in paths[step.block] if head or step.path + path != HEAD} | {*_experts(step)}
            for path, parameter in own[graph.name][step.name].items():
                shape = parameter.part_shape
                plain = parameter.group is None and all(n.endswith(WEIGHT) for n in parameter.sources)
                if path in multiply and plain and len(shape) == 2 and shape[0] > 1:
                    found[parameter.name] = parameter
                else:
                    others.update(parameter.sources)
    return [p for p in found.values() if others.isdisjoint(p.sources)]


def _experts(step: Step) -> Iterator[str]:
    """The paths in a step's block of the stacks of its experts, which are [outputs, inputs] each."""
    for part in parts(step):
        if isinstance(part.block, Experts) and not part.block.transposed:
            yield from (f"{part.path}{name}".removeprefix(step.path) for name in part.block.matrices)


def _group_size(rounding: Rounding, wanted: int, columns: int) -> int | None:
    """How many columns share a scale: as many as wanted, fewer where those do not fill a row, or None."""
    if not rounding.packs:
        return columns
    return next((size for size in GROUPS if size <= wanted and columns % size == 0), None)


def _said(rounding: Rounding, sizes: Mapping[str, int], checkpoint: Checkpoint, head: str) -> dict[str, Any]:
    """The quantization_config. The group of most matrices is that of their class, others name theirs."""
    by_size = {n: s if rounding.packs else None for n, s in sizes.items()}
    groups = {}
    for i, (size, _) in enumerate(Counter(by_size.values()).most_common()):
        targets = ["Linear"] if i == 0 else [n.removesuffix(WEIGHT) for n, s in by_size.items() if s == size]
        aside = {"input_activations": None, "output_activations": None}
        groups[f"group_{i}"] = {"targets": targets, "format": rounding.format, "weights": rounding.said(size), **aside}
    kept = [n for n, t in checkpoint.tensors.items() if len(t.shape) > 1 and n not in sizes]
    modules = [
        n.removesuffix(WEIGHT) if n.endswith(WEIGHT) else n.rpartition(".")[0]
        for n in (*kept, *({head} - sizes.keys()))
    ]
    # A module's own parameter, as a decay, must not leave out the matrices that lie below it.
    above = {"", *(n[:i] for n in sizes for i, letter in enumerate(n) if letter == ".")}
    return {
        "quant_method": "compressed-tensors",
        "format": rounding.format,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [m for m in dict.fromkeys(modules) if m not in above],
    }


def _notes(
    kind: str,
    wanted: int,
    found: list[Parameter],
    fits: Mapping[str, int | None],
    own: Own,
    checkpoint: Checkpoint,
    tower: tuple[str, ...],
) -> Iterator[str]:
    """What is not as was asked for, for people."""
    by_fit: dict[tuple[int, int | None], list[str]] = {}
    for p in found:
        by_fit.setdefault((p.part_shape[1], fits[p.name]), []).extend(p.sources)
    for (columns, size), names in by_fit.items():
        if size is None:
            yield f"{kind}: {_some(names)} is not rounded, no groups of 32 or more fill its rows of {columns}"
        elif ROUNDINGS[kind].packs and size != wanted:
            rows = f"its rows of {columns}" if columns % wanted else "the rows of all experts"
            yield f"{kind}: {_some(names)} has groups of {size}, as {wanted} do not fill {rows}"
    every = {n: p for g in own.values() for s in g.values() for p in s.values() for n in p.sources}
    if names := [n for n, p in every.items() if len(p.part_shape) == 3 and p.dtype == "W"]:
        yield f"{kind}: {_some(names)} is not rounded: experts in one tensor are not"
    if names := [n for n in checkpoint.tensors if any(fnmatch(n, t) for t in tower)]:
        yield f"{kind}: {_some(names)} is not rounded: a vision tower is not"


def _some(names: list[str]) -> str:
    """The first of some tensors, and how many there are."""
    more = f" (and {len(names) - 1} more like it)" if len(names) > 1 else ""
    return show_name(names[0]) + more
