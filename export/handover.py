"""Files by which other runtimes open an export's folder, written beside what the checkpoint brings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llmexport.export import genai, optimum
from llmexport.export.errors import ExportError
from llmexport.export.output import write_errors
from llmexport.export.spec import Graph, Use
from llmexport.export.stamp import read_errors
from llmexport.plugins.regular import read_regular

GENERATION = "generation_config.json"
# Graph, config of the text model, generation config, what the class of the former calls RoPE's keys -> JSON by the name
# of its file, and sentences for who exports.
Writer = Callable[[Graph, Mapping[str, Any], Mapping[str, Any], Mapping[str, str]], tuple[dict[str, Any], list[str]]]
RUNTIMES: Mapping[str, Writer] = MappingProxyType(
    {"genai": lambda graph, config, generation, _: genai.files(graph, config, generation), "optimum": optimum.files}
)
FED: tuple[Use, ...] = ("tokens", "padding", "positions")  # what every runtime feeds beside what is carried


@dataclass(frozen=True)
class HandOver:
    """Files that join or replace those of an export, and sentences on what their runtimes do with the model."""

    files: Mapping[str, bytes]
    notes: tuple[str, ...]

    def place(self, folder: Path) -> dict[str, str]:
        """Writes the files; returns their names and SHA-256."""
        with write_errors(folder):
            for name, data in self.files.items():
                (folder / name).write_bytes(data)
        return {name: hashlib.sha256(data).hexdigest() for name, data in self.files.items()}


def hand_over(
    runtimes: Collection[str],
    graphs: Sequence[Graph],
    config: Mapping[str, Any],
    folder: Path,
    keys: Mapping[str, str] = MappingProxyType({}),
) -> HandOver:
    """What the runtimes need. config: of the text model, which calls RoPE's keys by `keys`; folder: the checkpoint's.

    Raises ExportError on a model that one of them cannot run.
    """
    files: dict[str, Any] = {}
    notes: list[str] = []
    generation = _generation(folder) if runtimes else {}
    for runtime in dict.fromkeys(runtimes):
        if any(p.use == "features" for g in graphs for p in g.assembly.inputs):
            raise ExportError(
                f"--for {runtime} cannot run a model that reads pictures: pass --part text, or leave it out"
            )
        try:
            written, said = RUNTIMES[runtime](_decoder(graphs), config, generation, keys)
        except ExportError as error:
            raise ExportError(f"--for {runtime} cannot run this model, {error}: leave it out") from error
        files |= written
        notes += said
    return HandOver({name: f"{json.dumps(data, indent=2)}\n".encode() for name, data in files.items()}, tuple(notes))


def _decoder(graphs: Sequence[Graph]) -> Graph:
    """The graph that is all of a model that generates text. Raises ExportError on any other model."""
    if len(graphs) != 1:
        raise ExportError(f"which is {len(graphs)} graphs")
    [graph] = graphs
    if not graph.carried:
        raise ExportError("which carries nothing from token to token, as a decoder does")
    odd = [p.name for p in graph.assembly.inputs if p.name not in graph.carried and p.use not in FED]
    if odd:
        raise ExportError(f"as it feeds no {', '.join(odd)}")
    return graph


def _generation(folder: Path) -> dict[str, Any]:
    """How the checkpoint asks to be sampled; nothing where it does not say."""
    path = folder / GENERATION
    if not path.exists():
        return {}
    try:
        with read_errors(path):
            data = json.loads(read_regular(path))
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise ExportError(f"{path} holds no JSON object: download it again, or remove it")
    return data
