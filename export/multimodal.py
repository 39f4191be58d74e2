"""The checkpoints that hold a text model beside what sees, and their parts."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from llmexport.export.config import Config
from llmexport.export.errors import ExportError
from llmexport.export.keys import ANY, QUANTISATION
from llmexport.export.spec import Arch, Graph, Multimodal, Reference, Splice, Tower
from llmexport.export.values import key_name, same, show

PARTS = ("all", "text", "vision")


def outer_of(arch: Arch, config: Mapping[str, Any]) -> Multimodal | None:
    """The outer layout, if that is what this config is of."""
    return next((m for m in arch.multimodal if m.model_type == config.get("model_type")), None)


def wrong_text(key: str, kind: Any, types: Sequence[str]) -> ExportError:
    """A multimodal config whose text model is of another type than those that are published so."""
    return ExportError(f"config.json: {key} is of model_type {show(kind)}, expected {' or '.join(types)}")


def text_config(arch: Arch, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the text model, which a multimodal checkpoint's config holds among others.

    Raises ExportError on a key beside it that could concern the text model.
    """
    outer = outer_of(arch, config)
    if outer is None:
        return config
    inner = config.get(outer.config_key, {} if outer.flat else None)
    if not isinstance(inner, dict):
        raise ExportError(f"config.json has no {outer.config_key!r}: is it the config of a whole checkpoint?")
    types = outer.text_types or arch.model_types
    kind = inner.get("model_type", types[0])
    if kind not in types:
        raise wrong_text(outer.config_key, kind, types)
    beside = {k: v for k, v in config.items() if k not in (outer.config_key, *outer.harmless)}
    shared = {k: v for k, v in beside.items() if outer.flat or k == "tie_word_embeddings"}
    said = {k: v for k, v in inner.items() if v is not None and k not in ANY}
    differ = [k for k, v in shared.items() if v is not None and not same(v, said.get(k, v))]
    if differ:
        raise ExportError(f"config.json and its {outer.config_key} differ in {', '.join(differ)}: make them agree")
    either = {*inner, *ANY, *QUANTISATION, "tie_word_embeddings"}
    lone = [k for k, v in shared.items() if inner and v is not None and k not in either]
    if lone:
        raise ExportError(
            f"config.json says {', '.join(map(key_name, lone))} beside {outer.config_key}, which alone is read "
            "where it is there: write it inside, or leave it out"
        )
    if unread := [k for k in outer.absent if inner.get(k)]:
        raise ExportError(f"config.json: {', '.join(unread)} is no key of a {kind}, which does not slide: leave it out")
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


def read_tower(arch: Arch, config: Mapping[str, Any], part: str) -> tuple[Graph, Splice] | None:
    """The graph that sees, and what puts its features into the text; nothing if `part` needs neither.

    Raises ExportError if there is no such graph and the part is that alone, or if its config is not understood.
    """
    outer = outer_of(arch, config)
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


def with_part(arch: Arch, config: Mapping[str, Any], part: str, tensors: Collection[str] = ()) -> Arch:
    """The architecture, as `choose` gives it, with the names and the reference of this part of a checkpoint.

    `tensors` are the checkpoint's, by which it is known of which release its tower is.
    """
    outer = outer_of(arch, config)
    if part == "text" or outer is None or outer.tower is None:
        return arch
    ignore = tuple(i for i in arch.ignore if i not in outer.left_out)
    if part == "vision":
        ignore += tuple(f"{name.replace('{i}', '*')}*" for name in arch.names.values())
    reference = Reference(outer.architecture, arch.reference.outputs, joined=arch.reference.joined)
    names = max(_releases(outer.tower), key=lambda own: sum(map(functools.partial(_known, tensors), own.values())))
    return dataclasses.replace(arch, names={**arch.names, **names}, ignore=ignore, reference=reference)


def _releases(tower: Tower) -> Iterator[Mapping[str, str]]:
    """The names of a tower, then those in other releases."""
    for starts in ({}, *tower.other_names):
        yield {path: of_release(name, starts) for path, name in tower.names.items()}


def _known(tensors: Collection[str], name: str) -> bool:
    return any(t.startswith(name.partition("{i}")[0]) for t in tensors)


def of_release(name: str, starts: Mapping[str, str]) -> str:
    """The name of a tensor in a release that calls such starts of names otherwise."""
    start = next((s for s in starts if name.startswith(s)), "")
    return starts.get(start, "") + name.removeprefix(start)


def tower_tensors(arch: Arch, config: Mapping[str, Any], part: str) -> tuple[str, ...]:
    """Patterns (fnmatch) of the tensors that this part has and the text model leaves."""
    outer = outer_of(arch, config)
    return outer.left_out if outer and outer.tower and part != "text" else ()


def left_out(arch: Arch, config: Mapping[str, Any]) -> str:
    """What of a multimodal checkpoint no part has, for people; or nothing."""
    outer = outer_of(arch, config)
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
