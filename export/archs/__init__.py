"""One architecture, one data file; the file name is what `--arch` takes."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from llmexport.export import nearest
from llmexport.export.assembly import TABLE, has_own_head, renamed
from llmexport.export.config import Config
from llmexport.export.errors import ExportError
from llmexport.export.keys import ANY
from llmexport.export.spec import Arch, Graph, Multimodal, Reference, Splice
from llmexport.export.values import same, show, show_name

BASE = re.compile("For[A-Za-z]*$")
PARTS = ("all", "text", "vision")


def names() -> list[str]:
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem != "__init__")


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
    outer = _multimodal(arch, config)
    wanted = outer.architecture if outer else arch.reference.model_class
    classes = config.get("architectures")
    if classes is None:
        classes = [wanted]
    if not isinstance(classes, list) or wanted not in classes:
        why = "other heads and variants are not supported"
        if classes == [BASE.sub("Model", wanted)]:
            why = "a base model has no head that gives logits, "
            why += f"take a {wanted}" if has_own_head(arch) else "load it with AutoModelForCausalLM and save it"
        raise ExportError(
            f"config.json says architectures {show_name(classes)}, {arch.name} exports [{wanted!r}]: {why}"
        )
    return _inside(arch, outer, outer.names) if outer else arch


def text_config(arch: Arch, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the text model, which a multimodal checkpoint's config holds among others.

    Raises ExportError on a key beside it that could concern the text model.
    """
    outer = _multimodal(arch, config)
    if outer is None:
        return config
    inner = config.get(outer.config_key, {} if outer.flat else None)
    if not isinstance(inner, dict):
        raise ExportError(f"config.json has no {outer.config_key!r}: is it the config of a whole checkpoint?")
    types = outer.text_types or arch.model_types
    kind = inner.get("model_type", types[0])
    if kind not in types:
        raise ExportError(
            f"config.json: {outer.config_key} is of model_type {show(kind)}, expected {' or '.join(types)}"
        )
    beside = {k: v for k, v in config.items() if k not in (outer.config_key, *outer.harmless)}
    shared = {k: v for k, v in beside.items() if outer.flat or k == "tie_word_embeddings"}
    said = {k: v for k, v in inner.items() if v is not None and k not in ANY}
    differ = [k for k, v in shared.items() if v is not None and not same(v, said.get(k, v))]
    if differ:
        raise ExportError(f"config.json and its {outer.config_key} differ in {', '.join(differ)}: make them agree")
    Config({k: v for k, v in beside.items() if k not in shared}).finish(causal=True)
    # One list of keys became two, some of which stand in both.
    own = {k: v for k, v in inner.items() if not (outer.flat and k in outer.harmless)}
    return _completed({**shared, **own, "model_type": arch.model_types[0]}, outer)


def _completed(text: Mapping[str, Any], outer: Multimodal) -> Mapping[str, Any]:
    """The text model's config in the words of its own architecture."""
    ropes = {k: dict(text[k]) for k in ("rope_parameters", "rope_scaling") if isinstance(text.get(k), dict)}
    if outer.sections:
        for key, rope in ropes.items():
            plain = {k: v for k, v in rope.items() if k not in ("mrope_section", "mrope_interleaved")}
            ropes[key] = {k: "default" if v == "mrope" else v for k, v in plain.items()}
    # Theta stands among the other keys of RoPE or beside them.
    defaults = {k: v for k, v in outer.defaults.items() if not any(k in r for r in ropes.values())}
    return {**defaults, **text, **ropes}


def multimodal_names(arch: Arch, config: Mapping[str, Any], tensors: Collection[str]) -> Mapping[str, str]:
    """How a multimodal checkpoint renames the text model's tensors: start of the name here -> start there."""
    outer = _multimodal(arch, config)
    if outer is None:
        return {}
    table = _table(load(arch.name))
    known = (outer.names, *outer.other_names)
    return next((names for names in known if _renamed(table, names) in tensors), outer.names)


def in_layout(arch: Arch, config: Mapping[str, Any], tensors: Collection[str]) -> Arch:
    """The architecture, as `choose` gives it, with the names of the release that this checkpoint is of."""
    outer, names = _multimodal(arch, config), multimodal_names(arch, config, tensors)
    return arch if outer is None or names == outer.names else _inside(load(arch.name), outer, names)


def _multimodal(arch: Arch, config: Mapping[str, Any]) -> Multimodal | None:
    """The outer layout, if that is what this config is of."""
    return next((m for m in arch.multimodal if m.model_type == config.get("model_type")), None)


def read_tower(arch: Arch, config: Mapping[str, Any], part: str) -> tuple[Graph, Splice] | None:
    """The graph that sees, and what puts its features into the text; nothing if `part` needs neither.

    Raises ExportError if there is no such graph and the part is that alone, or if its config is not understood.
    """
    outer = _multimodal(arch, config)
    if part == "vision" and (outer is None or outer.tower is None):
        has = f"of {outer.model_type} the text model alone is exported" if outer else "config.json is of a text model"
        raise ExportError(f"--part vision: {has}: leave --part out")
    if part == "text" or outer is None or outer.tower is None:
        return None
    tower = outer.tower
    inner = config.get(tower.config_key)
    if not isinstance(inner, dict):
        raise ExportError(f"config.json has no {tower.config_key!r}: take the whole checkpoint, or pass --part text")
    keys = Config(inner)
    beside = Config({k: v for k, v in config.items() if k not in (tower.config_key, outer.config_key)})
    width = Config(text_config(arch, config)).length("hidden_size")
    try:
        made = tower.build(keys, beside, width)
        keys.finish(causal=False)
    except ExportError as error:
        raise ExportError(f"{error} (of {tower.config_key}, which --part text leaves out)") from error
    return made


def with_part(arch: Arch, config: Mapping[str, Any], part: str) -> Arch:
    """The architecture, as `choose` gives it, with the names and the reference of this part of a checkpoint."""
    outer = _multimodal(arch, config)
    if part == "text" or outer is None or outer.tower is None:
        return arch
    ignore = tuple(i for i in arch.ignore if i not in outer.left_out)
    if part == "vision":
        ignore += tuple(f"{name.replace('{i}', '*')}*" for name in arch.names.values())
    reference = Reference(outer.architecture, arch.reference.outputs)
    return dataclasses.replace(arch, names={**arch.names, **outer.tower.names}, ignore=ignore, reference=reference)


def tower_tensors(arch: Arch, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Patterns (fnmatch) of the tensors that only what sees has, if that is exported."""
    outer = _multimodal(arch, config)
    return outer.left_out if outer and outer.tower else ()


def left_out(arch: Arch, config: Mapping[str, Any]) -> str:
    """What of a multimodal checkpoint no part has, for people; or nothing."""
    outer = _multimodal(arch, config)
    if outer is None or outer.tower:
        return ""
    what = ", ".join(outer.left_out)
    return f"{outer.model_type}: the text model alone is exported, {what} left out: it takes no pictures"


def tiny_config(arch: Arch, part: str) -> Mapping[str, Any]:
    """The built-in config: that of the text model, or of the whole checkpoint around it.

    Raises ExportError if there is no such whole.
    """
    if part == "text":
        return arch.tiny
    outer, tower = next(((m, m.tower) for m in arch.multimodal if m.tower), (None, None))
    if outer is None or tower is None:
        raise ExportError(f"--part {part}: {arch.name} has no vision tower here: leave --part out")
    inner = {"model_type": arch.model_types[0], **arch.tiny}
    return {
        "architectures": [outer.architecture],
        "model_type": outer.model_type,
        outer.config_key: inner,
        "tie_word_embeddings": inner["tie_word_embeddings"],
        **tower.tiny,
    }


def tiny_files(arch: Arch) -> Mapping[str, str]:
    """What lies beside the weights of the whole checkpoint of `tiny_config`: its tokenizer and its processor."""
    from llmexport.export.tiny_words import tokenizer

    tower = next(m.tower for m in arch.multimodal if m.tower)
    said = {n: d if isinstance(d, str) else json.dumps(d, indent=2) for n, d in tower.beside.items()}
    return {"tokenizer.json": tokenizer(tower.words), **said}


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
    inside = renamed(arch, lambda name: _renamed(name, names))
    base = _renamed(arch.base, names)
    return dataclasses.replace(inside, ignore=inside.ignore + outer.ignore + outer.left_out, base=base)


def _renamed(name: str, names: Mapping[str, str]) -> str:
    start = next((s for s in names if name.startswith(s)), "")
    return names.get(start, "") + name.removeprefix(start)


def _table(arch: Arch) -> str:
    """What a checkpoint calls the table of words."""
    return next(n for path, n in arch.names.items() if TABLE.startswith(path)) + "weight"


def _types(arch: Arch) -> tuple[str, ...]:
    return arch.model_types + tuple(m.model_type for m in arch.multimodal)


def _by_type(name: str | None, config: Mapping[str, Any]) -> Arch:
    kind = config.get("model_type")
    if name is None:
        matches = [n for n in map(load, names()) if kind in _types(n)]
        if not matches:
            every = [load(n) for n in names()]
            by_type = {t: n.name for n in every for t in _types(n)}
            raise nearest.refusal(config, by_type, {m.model_type: bool(m.tower) for n in every for m in n.multimodal})
        return matches[0]
    arch = load(name)
    if kind not in _types(arch):
        raise ExportError(
            f"--arch {name} exports model_type {', '.join(_types(arch))}, "
            f"but config.json says {show(kind)}: leave --arch out, or check the folder"
        )
    return arch
