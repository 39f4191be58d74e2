"""One architecture, one data file; the file name is what `--arch` takes."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmexport.export.errors import ExportError
from llmexport.export.spec import Arch


@dataclass(frozen=True)
class Named:
    """An architecture and the name it goes by."""

    name: str
    arch: Arch


def names() -> list[str]:
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem != "__init__")


def load(name: str) -> Named:
    """The architecture called `name`. Raises ExportError with the nearest names if there is none."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(names())}"
        raise ExportError(f"unknown architecture {name!r}: {hint} See `llmexport archs`")
    return Named(name, importlib.import_module(f"llmexport.export.archs.{name}").ARCH)


def choose(name: str | None, config: Mapping[str, Any]) -> Named:
    """The architecture asked for, or else the one that `config.json` names; the two must agree."""
    named = _by_type(name, config.get("model_type"))
    classes = config.get("architectures") or [named.arch.causal_lm]
    if named.arch.causal_lm not in classes:
        raise ExportError(
            f"config.json says architectures {str(classes)[:200]!r}, {named.name} exports {named.arch.causal_lm}: "
            "other heads and variants are not supported"
        )
    return named


def _by_type(name: str | None, kind: Any) -> Named:
    if name is None:
        matches = [n for n in map(load, names()) if kind in n.arch.model_types]
        if not matches:
            raise ExportError(
                f"config.json is of model_type {kind!r}, which no architecture here exports: "
                f"supported are {', '.join(names())}. A similar one would give a wrong model"
            )
        return matches[0]
    named = load(name)
    if kind not in named.arch.model_types:
        raise ExportError(
            f"--arch {name} exports model_type {', '.join(named.arch.model_types)}, "
            f"but config.json says {kind!r}: leave --arch out, or check the folder"
        )
    return named
