"""`engine.json`: what the engines of an export are, and whether they can run here.

It is read where neither torch nor a checkpoint is, and before TensorRT is asked anything: nothing here imports any.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from llmexport.export.binding import Binding
from llmexport.export.device import Device
from llmexport.export.engine_kernels import Kernel
from llmexport.export.errors import EngineError
from llmexport.export.identity import WeightFile
from llmexport.export.spec import Port, Sizes
from llmexport.export.typed import DAMAGED, typed
from llmexport.plugins.regular import open_regular, read_regular, sha256

RECORD = "engine.json"
FORMAT = 4
WEIGHTS = ("inside", "beside")  # the plans
MOST = 100_000_000  # bytes, as of a manifest
DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Plan:
    """The engine of one graph.

    model_sha256: of the graph's `.onnx`. inputs, outputs: with the dtypes of the engine. carried: as in the manifest.
    bindings: of each weight that is an input beside these. layers: how many TensorRT read, by kind. plugins: how often
    each op is a plugin layer. messages: TensorRT's warnings. seconds: how long the builder ran. kernels: what a step
    launches, in TensorRT's order; None where its list could not be read.
    """

    file: str
    bytes: int
    sha256: str
    model_sha256: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    carried: Mapping[str, str]
    bindings: Mapping[str, Binding]
    layers: Mapping[str, int]
    plugins: Mapping[str, int]
    messages: tuple[str, ...]
    seconds: float
    kernels: tuple[Kernel, ...] | None = None


@dataclass(frozen=True)
class Library:
    """A plugin library, which must be loaded before the engine is."""

    file: str
    sha256: str


@dataclass(frozen=True)
class Engine:
    """What `engine.json` says: what all plans share, and the plan of each graph by name.

    target: the GPUs that the plans run on. least: the compute capability that they need, if any will not do.
    built_on: the GPU, where the backend's plans are bound to its kind.
    weights_at: "inside" the plans, or "beside" them, in the files. checked: how much of the weights was read.
    profile: (min, opt, max) of each dynamic dimension.
    """

    backend: str
    version: str
    target: str
    least: tuple[int, int] | None
    built_on: Device | None
    arch: str
    block: str | None
    dtype: str
    weights_at: str
    weights: tuple[WeightFile, ...]
    checked: str
    profile: Mapping[str, Sizes]
    plugins: tuple[Library, ...]
    graphs: Mapping[str, Plan]

    def as_data(self) -> dict[str, Any]:
        return {"format": FORMAT, **dataclasses.asdict(self)}


def read(folder: Path) -> Engine:
    """What `engine.json` in the folder says. Raises EngineError if there is none, or it is not whole."""
    path = folder / RECORD
    try:
        data = json.loads(read_regular(path, MOST))
        if data["format"] != FORMAT:
            said = f"{path} is of format {data['format']!r}, this version reads {FORMAT}"
            raise EngineError(f"{said}: {rebuild(folder)}")
        for plan in data["graphs"].values():
            plan.setdefault("kernels", None)
        engine: Engine = typed(Engine, {k: v for k, v in data.items() if k != "format"})
        _check(engine)
    except FileNotFoundError as error:
        raise EngineError(f"{folder} holds no engine: build one: llmexport engine {folder}") from error
    except OSError as error:
        raise EngineError(f"cannot read {path}: {error.strerror}: {rebuild(folder)}") from error
    except DAMAGED as error:
        raise EngineError(f"{path} is damaged or of another version ({error!r}): {rebuild(folder)}") from error
    return engine


def outside(profile: Mapping[str, Sizes], sizes: Iterable[tuple[str, int]]) -> str:
    """Why an engine of this profile does not take these sizes, each with its axis, or nothing."""
    for axis, size in sizes:
        low, _, high = profile.get(axis, (size, size, size))
        if not low <= size <= high:
            return f"{axis} is {size}, the engine takes {low} to {high}"
    return ""


def rebuild(folder: Path, engine: Engine | None = None) -> str:
    """The advice to build the engine anew, as it was built if that is known."""
    said = f" --backend {engine.backend}" if engine else ""
    said += " --weights beside" if engine and engine.weights_at == "beside" else ""
    return f"build it again: llmexport engine {folder}{said}"


def _check(engine: Engine) -> None:
    """What its types do not say. Raises ValueError."""
    if not engine.graphs:
        raise ValueError("no graph")
    if engine.weights_at not in WEIGHTS or (
        engine.weights_at == "inside" and any(p.bindings for p in engine.graphs.values())
    ):
        raise ValueError(f"weights_at {engine.weights_at!r}")
    plans = engine.graphs.values()
    for name in [p.file for p in plans] + [w.file for w in engine.weights]:
        if Path(name).name != name:
            raise ValueError(f"{name!r} is no name of a file")
    for digest in [d for p in plans for d in (p.sha256, p.model_sha256)] + [p.sha256 for p in engine.plugins]:
        if not DIGEST.fullmatch(digest):
            raise ValueError(f"digest {digest!r}")


def check_files(folder: Path, engine: Engine) -> None:
    """Raise EngineError if a plan or the plugin library is not the file that was recorded."""
    again = rebuild(folder, engine)
    for library in engine.plugins:
        cure = f"put the plugin library back that {folder} was built with, or {again}"
        with _opened(Path(library.file), cure) as file:
            if sha256(file) != library.sha256:
                raise EngineError(f"{library.file} is not what it was: {cure}")
    for plan in engine.graphs.values():
        with _opened(folder / plan.file, again) as file:
            _check_size(file, plan, folder / plan.file, again)
            if sha256(file) != plan.sha256:
                raise EngineError(f"{folder / plan.file} is not the plan that {RECORD} describes: {again}")


def read_plan(path: Path, plan: Plan) -> bytes:
    """All bytes of a plan. Raises EngineError if they are others than were recorded."""
    again = rebuild(path.parent)
    with _opened(path, again) as file:
        _check_size(file, plan, path, again)
        data = file.read()
    if hashlib.sha256(data).hexdigest() != plan.sha256:
        raise EngineError(f"{path} is not the plan that {RECORD} describes: {again}")
    return data


@contextlib.contextmanager
def _opened(path: Path, cure: str) -> Iterator[BinaryIO]:
    try:
        with open_regular(path) as file:
            yield file
    except OSError as error:
        raise EngineError(f"cannot read {path}: {error.strerror}: {cure}") from error


def _check_size(file: BinaryIO, plan: Plan, path: Path, cure: str) -> None:
    size = os.fstat(file.fileno()).st_size
    if size != plan.bytes:
        raise EngineError(f"{path} has {size} bytes, {RECORD} says {plan.bytes}: {cure}")


def check_version(folder: Path, engine: Engine, installed: str) -> None:
    """Raise EngineError if the TensorRT that is installed is not the one that built the plans: it reads no other's."""
    if installed != engine.version:
        raise EngineError(
            f"{folder} was built by {engine.backend} {engine.version}, {installed} is installed here: install that "
            f"version, or {rebuild(folder, engine)}"
        )


def check_device(folder: Path, engine: Engine, device: Device) -> str:
    """What is to be known of the plans on this GPU, or nothing. Raises EngineError if they cannot run on it."""
    least, built_on = engine.least, engine.built_on
    if least and device.capability < least:
        wants = f"compute capability {least[0]}.{least[1]} or later"
        raise EngineError(f"{folder} runs on {engine.target}, here is {device.text}: take a GPU of {wants}")
    if built_on and built_on.capability != device.capability:
        cure = f"on the GPU that it is for, {rebuild(folder, engine)}"
        raise EngineError(f"{folder} was built on {built_on.text}, here is {device.text}: {cure}")
    if built_on and built_on.name != device.name:
        return f"built on {built_on.name}, run on {device.name}"
    return ""
