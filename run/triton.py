"""A model repository of Triton Inference Server, made of an engine or of an export."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from llmexport.export import engine_record, manifest
from llmexport.export.engine_record import Engine
from llmexport.export.exported import Export
from llmexport.export.graph_file import load
from llmexport.export.output import new_folder
from llmexport.export.placing import place_weights
from llmexport.export.spec import ONLY, Port
from llmexport.export.stamp import Stamp, read_errors, stamp
from llmexport.plugins import library
from llmexport.run.errors import RunError
from llmexport.run.triton_config import kept_in_server, model_config

BACKENDS = ("tensorrt", "onnxruntime")  # Triton's
CONFIG, VERSION = "config.pbtxt", "1"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Served:
    """A graph as a model of the repository. files: what its version folder holds, as it was when it was checked."""

    name: str
    file: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    carried: Mapping[str, str]
    files: Mapping[Path, Stamp]


@dataclass(frozen=True)
class Repository:
    """What was written. models: their names. register: the library for --backend-config, if there are plugins."""

    backend: str
    models: tuple[str, ...]
    register: Path | None
    notes: tuple[str, ...]


def write(
    folder: Path, target: Path, *, backend: str | None = None, name: str | None = None, weights: str = "auto"
) -> Repository:
    """Writes the repository `target`, a new folder that appears whole or not at all.

    folder: an export, or for "tensorrt" what holds its engine. backend: None takes the engine, if one of TensorRT is
    there. name: of the model; of each of several graphs the start of it. weights: as `onnx --weights`. Raises RunError,
    EngineError or ExportError.
    """
    if os.path.lexists(target):
        raise RunError(f"{target} exists: choose another folder for the repository, or remove it")
    if backend not in (None, *BACKENDS):
        raise RunError(f"backend is {backend!r}: choose one of {', '.join(BACKENDS)}")
    if name is not None and not NAME.fullmatch(name):
        raise RunError(f"name is {name!r}: make it of letters, digits, '_', '-' and '.'")
    chosen = backend or _default(folder)
    engine = _engine(folder) if chosen == "tensorrt" else None
    served = list(_plans(folder, engine, name) if engine else _graphs(folder, name))
    parameters = {"made_by": "llmexport", **({"tensorrt_version": engine.version} if engine else {})}
    register: Path | None = None
    with new_folder(target, force=False) as made:
        for model in served:
            place = made / model.name / VERSION
            place.mkdir(parents=True)
            place_weights(model.files, place, weights)
            ports = (model.inputs, model.outputs, model.carried)
            (place.parent / CONFIG).write_text(model_config(model.name, chosen, model.file, *ports, parameters))
        if engine and engine.plugins:
            inside = Path(served[0].name, VERSION)
            _place_plugins(Path(engine.plugins[0].file), made / inside)
            register = target / inside / library.REGISTER
    return Repository(chosen, tuple(m.name for m in served), register, tuple(_notes(served)))


def _default(folder: Path) -> str:
    """What serves what is there."""
    if (folder / engine_record.RECORD).exists() and engine_record.read(folder).backend == "tensorrt":
        return "tensorrt"
    return "onnxruntime"


def _engine(folder: Path) -> Engine:
    """The engine in the folder, which Triton can load, and whose files are those that were built."""
    engine = engine_record.read(folder)
    if engine.backend != "tensorrt":
        raise RunError(
            f"{folder} holds an engine of {engine.backend}, and Triton loads those of TensorRT: build one where the "
            f"GPU is, llmexport engine {folder} --backend tensorrt, or serve the ONNX file, --backend onnxruntime"
        )
    if any(plan.bindings for plan in engine.graphs.values()):
        raise RunError(
            f"the engine in {folder} has its weights beside the plan, which Triton does not bind: "
            f"llmexport engine {folder} --backend tensorrt --weights inside"
        )
    return engine


def _plans(folder: Path, engine: Engine, name: str | None) -> Iterator[Served]:
    seen = {graph: stamp(folder / plan.file) for graph, plan in engine.graphs.items() if (folder / plan.file).exists()}
    engine_record.check_files(folder, engine)
    for graph, plan in engine.graphs.items():
        files = {folder / plan.file: seen[graph]}
        yield Served(_name(name or _called(engine), graph), plan.file, plan.inputs, plan.outputs, plan.carried, files)


def _graphs(folder: Path, name: str | None) -> Iterator[Served]:
    export = manifest.read(folder)
    if export.target == "tensorrt":
        raise RunError(
            f"{folder} was exported for {export.target}, without function bodies: export it without --target"
        )
    weights = {folder / w.file: export.held[w.file].stamp for w in export.weights}
    for graph in export.graphs:
        with read_errors(folder / graph.file):
            seen = stamp(folder / graph.file)
        load(export, graph)
        inputs, outputs = (
            (p.typed(export.dtype) for p in side) for side in (graph.assembly.inputs, graph.assembly.outputs)
        )
        files = {folder / graph.file: seen, **weights}
        yield Served(
            _name(name or _called(export), graph.name), graph.file, tuple(inputs), tuple(outputs), graph.carried, files
        )


def _called(made: Engine | Export) -> str:
    return made.arch if made.block is None else f"{made.arch}-{made.block}"


def _name(model: str, graph: str) -> str:
    return model if graph == ONLY else f"{model}-{graph}"


def _place_plugins(plugins: Path, folder: Path) -> None:
    """Puts the plugin library into the folder, and the one that registers it beside it, which is how that finds it."""
    for source, name in ((plugins, library.FILE), (library.registering(plugins), library.REGISTER)):
        shutil.copyfile(source, folder / name)


def _notes(served: Iterable[Served]) -> Iterator[str]:
    for model in served:
        for port in (p for p in model.inputs if p.use == "features"):
            yield (
                f"{model.name} reads {port.name} from the model before it, with the prompt that has pictures; "
                f"at any other step the client gives no rows of it: [0, {port.shape[-1]}]"
            )
        if model.carried and not kept_in_server(model.inputs, model.outputs, model.carried):
            yield (
                f"{model.name} carries what grows with the text, which crosses the server at every step: for Triton's "
                "implicit state export with --cache static"
            )
