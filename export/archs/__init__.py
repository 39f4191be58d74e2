"""One architecture, one data file; the file name is what `--arch` takes."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from llmexport.export import nearest
from llmexport.export.assembly import TABLE, has_own_head, renamed
from llmexport.export.errors import ExportError
from llmexport.export.multimodal import of_release, outer_of, tiny_config, wrong_text
from llmexport.export.spec import Arch, Multimodal
from llmexport.export.values import show, show_name

__all__ = ["as_stored", "choose", "in_layout", "load", "multimodal_names", "names", "tiny_config"]

BASE = re.compile("For[A-Za-z]*$")


@functools.cache
def names() -> tuple[str, ...]:
    return tuple(sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem != "__init__"))


@functools.cache
def load(name: str) -> Arch:
    """The architecture called `name`. Raises ExportError with the nearest names if there is none."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(names())}"
        raise ExportError(f"unknown architecture {name!r}: {hint} See `llmexport archs`")
    arch: Arch = importlib.import_module(f"llmexport.export.archs.{name}").ARCH
    return dataclasses.replace(arch, name=name)


def choose(name: str | None, config: Mapping[str, Any]) -> Arch:
    """The architecture asked for, or else the one that `config.json` names; the two must agree."""
    arch = _by_type(name, config)
    outer = outer_of(arch, config)
    wanted = outer.architecture if outer else arch.reference.model_class
    classes = config.get("architectures")
    if classes is None:
        classes = [wanted]
    known = {wanted, *arch.reference.aliases, *arch.reference.copies}
    if not isinstance(classes, list) or not known & {*map(str, classes)}:
        why = "other heads and variants are not supported"
        if classes == [BASE.sub("Model", wanted)]:
            why = "a base model has no head that gives logits, "
            why += f"take a {wanted}" if has_own_head(arch) else "load it with AutoModelForCausalLM and save it"
        raise ExportError(
            f"config.json says architectures {show_name(classes)}, {arch.name} exports [{wanted!r}]: {why}"
        )
    return _inside(arch, outer, outer.names) if outer else arch


def multimodal_names(arch: Arch, config: Mapping[str, Any], tensors: Collection[str]) -> Mapping[str, str]:
    """How a multimodal checkpoint renames the text model's tensors: start of the name here -> start there."""
    outer = outer_of(arch, config)
    if outer is None:
        return {}
    table = _table(load(arch.name))
    known = (outer.names, *outer.other_names)
    return next((names for names in known if of_release(table, names) in tensors), outer.names)


def in_layout(arch: Arch, config: Mapping[str, Any], tensors: Collection[str]) -> Arch:
    """The architecture, as `choose` gives it, with the names of the release that this checkpoint is of."""
    outer, names = outer_of(arch, config), multimodal_names(arch, config, tensors)
    return arch if outer is None or names == outer.names else _inside(load(arch.name), outer, names)


def as_stored(arch: Arch, tensors: Collection[str]) -> Arch:
    """The architecture with the names of this checkpoint: those of a base model, if that is what it is.

    Raises ExportError on a base model whose head cannot be made of what it holds.
    """
    base = arch.base
    table = _table(arch)
    if any(n.startswith(base) for n in tensors) or table.removeprefix(base) not in tensors:
        return arch
    if has_own_head(arch):
        raise ExportError(
            f"the checkpoint is a base model, its names lack {base!r}: it has no head that gives logits, "
            f"take a {arch.reference.model_class}"
        )
    return renamed(arch, lambda name: name.removeprefix(base))


def _inside(arch: Arch, outer: Multimodal, names: Mapping[str, str]) -> Arch:
    """The architecture with the names that its parameters have in the whole checkpoint."""
    inside = renamed(arch, lambda name: of_release(name, names))
    base = of_release(arch.base, names)
    return dataclasses.replace(inside, ignore=inside.ignore + outer.ignore + outer.left_out, base=base)


def _table(arch: Arch) -> str:
    """What a checkpoint calls the table of words."""
    return next(n for path, n in arch.names.items() if TABLE.startswith(path)) + "weight"


def _types(arch: Arch) -> tuple[str, ...]:
    return arch.model_types + tuple(m.model_type for m in arch.multimodal)


@functools.cache
def _every_type() -> Mapping[str, tuple[str, ...]]:
    """By architecture."""
    return {n: _types(load(n)) for n in names()}


def _by_type(name: str | None, config: Mapping[str, Any]) -> Arch:
    kind = config.get("model_type")
    if name is None:
        matches = [load(n) for n, types in _every_type().items() if kind in types]
        told = [n for n in matches if n.told_by and n.told_by in config]
        matches = told or [n for n in matches if not n.told_by]
        if not matches:
            every = [load(n) for n in names()]
            by_type = {t: n.name for n in every for t in _types(n)}
            raise nearest.refusal(config, by_type, {m.model_type: bool(m.tower) for n in every for m in n.multimodal})
        return _of_its_text(matches, config)
    arch = load(name)
    if kind not in _types(arch):
        raise ExportError(
            f"--arch {name} exports model_type {', '.join(_types(arch))}, "
            f"but config.json says {show(kind)}: leave --arch out, or check the folder"
        )
    return arch


def _of_its_text(matches: list[Arch], config: Mapping[str, Any]) -> Arch:
    """The one whose text model is within the config: several are published within one kind of checkpoint."""
    outers = [(n, m) for n in matches if (m := outer_of(n, config))]
    told = [(m.config_key, m.text_types or n.model_types) for n, m in outers]
    inner = config.get(told[0][0]) if told else None
    if len(matches) == 1 or not isinstance(inner, dict):
        return matches[0]
    kind = inner.get("model_type")
    found = [n for (n, _), (_, types) in zip(outers, told, strict=True) if kind in types]
    if not found:
        raise wrong_text(told[0][0], kind, [t for _, types in told for t in types])
    return found[0]
