"""Families that are not exported: what a config is of, and what is nearest to it here."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from llmexport.export.errors import ExportError
from llmexport.export.values import show

# What a multimodal config has beside the keys of its text model.
TOWERS = ("vision_config", "audio_config", "text_config", "thinker_config", "visual")
CUTOFF, MOST = 0.6, 3  # of the names' likeness, and how many are said


def refusal(config: Mapping[str, Any], types: Mapping[str, str], sees: Mapping[str, bool]) -> ExportError:
    """`types` are the model types that are exported and their architectures, `sees` says of the multimodal ones among
    them whether their tower is exported too."""
    kind, text = config.get("model_type"), config.get("text_config")
    if kind is None:
        return ExportError("config.json has no 'model_type': is it the config of a model that transformers loads?")
    said = [f"config.json is of model_type {show(kind)}, which no architecture here exports"]
    if towers := [k for k in TOWERS if isinstance(config.get(k), dict)]:
        whole, text_alone = (", ".join(t for t, seen in sees.items() if seen is tower) for tower in (True, False))
        said.append(
            f"it is multimodal ({', '.join(towers)}): of such, {whole} are exported with their tower, "
            f"and the text model alone of {text_alone}"
        )
    inner = text.get("model_type") if isinstance(text, dict) else None
    if near := dict.fromkeys(types[t] for t in _near(str(inner or kind), types)):
        said.append(f"nearest is {', '.join(near)}, which would give a wrong model")
    return ExportError(f"{'; '.join(said)}: supported are {', '.join(dict.fromkeys(types.values()))}")


def _near(kind: str, types: Collection[str]) -> list[str]:
    """Types of a like name, the likest first, and those that the name goes on from."""
    close = difflib.get_close_matches(kind, types, n=MOST, cutoff=CUTOFF)
    return close + [t for t in types if kind.startswith(t)]
