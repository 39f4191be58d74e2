"""What --force may replace: a folder that an earlier run made, with nothing in it that somebody else put there."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llmexport.export.errors import ExportError
from llmexport.export.folder import INDEX
from llmexport.export.spec import ONLY
from llmexport.export.workspace import sweep

# The file by which each kind of output is known; a downloaded checkpoint has none of them.
EXPORT, BLOCKS, RANDOM = "manifest.json", "blocks.json", "llmexport-random.json"
# What later commands add to an export, beside a plan for each graph.
ADDED = {"engine.json", "report.json", "report.html", "bench.json", "bench.html"}


def check(target: Path, record: str) -> None:
    """Raise ExportError if anything of the folder `target` is not what its `record` says that a run wrote."""
    sweep(target)
    names = os.listdir(target)
    if not names:
        return
    spared = "and --force does not replace it: choose another folder, or remove it yourself"
    if record not in names:
        raise ExportError(f"{target} has no {record}, so it is no earlier output, {spared}")
    try:
        ours = FILES[record](target)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ExportError(
            f"{target / record} is none of llmexport's, so {target} is no earlier output, {spared}"
        ) from error
    folders = {parent for file in ours for parent in Path(file).parents}
    for name in _inside(target):
        if name in ours or (Path(name) in folders and stat.S_ISDIR(os.lstat(target / name).st_mode)):
            continue
        raise ExportError(
            f"{target} also holds {name!r}, which is not of the export there and which --force would delete: "
            "move it away, or choose another folder"
        )


def _inside(folder: Path) -> list[str]:
    """The names of all that is in a folder, relative to it; links are not followed."""
    found = []
    for place, folders, files in os.walk(folder, onerror=_refuse):
        found += [os.path.relpath(os.path.join(place, n), folder) for n in (*folders, *files)]
    return sorted(found)


def _refuse(error: OSError) -> None:
    raise error


def _export(folder: Path) -> set[str]:
    """The files of an export."""
    data = _read(folder / EXPORT)
    listed = {f["file"] for f in data["weights"]["files"]} | set(data.get("files", ()))
    if type(data["format"]) is not int or not {"arch", "blocks", "config"} <= data.keys():
        raise ValueError("not a manifest of ours")
    # One of an earlier version has one graph, and does not name it.
    graphs = {f"{name}{end}" for name in data.get("graphs", [ONLY]) for end in (".onnx", ".plan")}
    return {EXPORT} | graphs | ADDED | listed


def _blocks(folder: Path) -> set[str]:
    """The files of a folder of exported blocks."""
    data = _read(folder / BLOCKS)
    names = data["blocks"]
    if data.keys() - {"blocks", "made_by"} or not isinstance(names, list) or not all(_is_name(n) for n in names):
        raise ValueError("not a list of blocks of ours")
    return {BLOCKS} | {f"{n}/{file}" for n in names for file in _export(folder / n)}


def _random(folder: Path) -> set[str]:
    """The files of a random checkpoint."""
    data = _read(folder / RANDOM)
    if data.keys() - {"seed", "made_by"} or type(data["seed"]) is not int:
        raise ValueError("not a random checkpoint of ours")
    return {RANDOM, INDEX, "config.json"} | set(_read(folder / INDEX)["weight_map"].values())


# By the file that records an output.
FILES: Mapping[str, Callable[[Path], set[str]]] = MappingProxyType({EXPORT: _export, BLOCKS: _blocks, RANDOM: _random})


def _read(path: Path) -> dict[str, Any]:
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise ValueError("not a file")
    data = json.loads(path.read_bytes())
    if not isinstance(data, dict):
        raise ValueError("not an object")
    return data


def _is_name(value: object) -> bool:
    return isinstance(value, str) and Path(value).name == value
