"""From an export to a TensorRT engine: `model.plan` and `engine.json`, in the export's own folder.

The builder runs in a process of its own (`engine_build.py`), so that its crash is an error and not ours.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llmexport.export import manifest
from llmexport.export.errors import EngineError
from llmexport.export.manifest import MODEL
from llmexport.export.onnx_file import Progress, load
from llmexport.export.output import write_errors
from llmexport.export.spec import AXES, Assembly, Axis, Port, Sizes, summands
from llmexport.export.tensorrt_form import tensorrt_form
from llmexport.export.workspace import workspace
from llmexport.plugins import library
from llmexport.plugins.dtypes import BY_TENSORRT

PLAN = "model.plan"
RECORD = "engine.json"
FORMAT = 1
COMMAND = (sys.executable, "-X", "faulthandler", "-m", "llmexport.export.engine_build")


@dataclass(frozen=True)
class Backend:
    """A flavour of TensorRT: its module, the command that installs it, and the GPUs that its plans run on."""

    module: str
    install: str
    target: str


BACKENDS = MappingProxyType(
    {
        "tensorrt-rtx": Backend(
            "tensorrt_rtx", "pip install tensorrt-rtx", "NVIDIA GPUs of compute capability 8.0 and later"
        ),
        "tensorrt": Backend(
            "tensorrt",
            "pip install tensorrt --extra-index-url https://pypi.nvidia.com (it builds only where a GPU is)",
            "the kind of GPU it was built on",
        ),
    }
)

# Warnings after which TensorRT goes on with a part of the model left out or changed.
ANOTHER_GRAPH = re.compile(
    "Unused Input: |currently ignores|Ignoring shape|[Cc]lamp(ing to|ed)|not found in plugin node|wrong shape"
)
TYPES = {name: d.name for name, d in BY_TENSORRT.items()}


@dataclass(frozen=True)
class Profile:
    """The sizes that an engine takes and is tuned for: (min, opt, max) of dynamic dimensions by name.

    What is not named has the sizes of its Axis; one that is a sum, as `total` is past + sequence, cannot be named.
    """

    sizes: Mapping[str, Sizes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, (low, opt, high) in self.sizes.items():
            said = f"profile says {name}={low}:{opt}:{high}"
            axis = AXES.get(name, Axis(name))
            if axis.sum_of:
                raise EngineError(f"{said}, but {name} is {' + '.join(axis.sum_of)}: name those")
            if not axis.least <= low <= opt <= high < 2**31:
                raise EngineError(f"{said}: make it {axis.least} <= min <= opt <= max < 2**31")

    def resolve(self, ports: Iterable[Port]) -> dict[str, Sizes]:
        """The sizes of every dynamic dimension of these ports. Raises EngineError on one that they lack."""
        dims = {d for p in ports for d in p.shape if isinstance(d, str)}
        free = {n for d in dims for n in summands(d)}
        if stray := sorted(set(self.sizes) - free):
            known = ", ".join(sorted(free))
            raise EngineError(f"profile names {', '.join(stray)}: this export has the sizes {known}")
        defaults = {a.name: a.profile for a in AXES.values() if a.profile}
        sizes = {d: s for d, s in {**defaults, **self.sizes}.items() if d in free}
        if unsaid := sorted(free - set(sizes)):
            raise EngineError(f"{', '.join(unsaid)} has no default sizes: name it in --profile")
        for dim in dims - free:
            low, opt, high = map(sum, zip(*(sizes[n] for n in summands(dim)), strict=True))
            sizes[dim] = (low, opt, high)
            if high >= 2**31:
                says = " and ".join(f"{sizes[n][2]} {n}" for n in summands(dim))
                raise EngineError(f"profile says up to {says}: make their sum less than 2**31")
        return sizes


def parse_profile(text: str) -> Profile:
    """The profile in a text like `batch=1:1:4,sequence=1:64:512,past=0:512:2048`; `batch=4` is 4:4:4."""
    sizes: dict[str, Sizes] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)=(\d{1,10})(?::(\d{1,10}):(\d{1,10}))?\s*", part, re.ASCII)
        if not match:
            raise EngineError(f"profile says {part!r}: write name=min:opt:max, as in batch=1:1:4, or batch=4")
        name, low, opt, high = match.groups()
        if name in sizes:
            raise EngineError(f"profile names {name} twice")
        sizes[name] = (int(low), int(opt or low), int(high or low))
    return Profile(sizes)


def check_backend(name: str) -> Backend:
    """The backend of that name. Raises EngineError with the command that installs it, if it is not here."""
    chosen = BACKENDS[name]
    if importlib.util.find_spec(chosen.module) is None:
        raise EngineError(f"{name} is not installed: {chosen.install}")
    return chosen


def build(
    folder: Path,
    *,
    backend: str = "tensorrt-rtx",
    profile: Profile | None = None,
    plugins: Path | None = None,
    timeout: float | None = None,
    verify: bool = False,
    progress: Progress,
) -> dict[str, Any]:
    """Builds an engine of the export in `folder` and writes it there; returns what `engine.json` says.

    plugins: the plugin library, whose kernels take the place of the ops it serves; other ops, or all if it is
    None, are built from their function bodies.

    timeout: seconds until the builder is given up, None to wait. Whatever fails, an earlier engine stays.
    verify: every byte of the weights is held against the digests of the export. What was read of them is in "checked".
    Raises EngineError, and ExportError if `folder` is no export, was changed since, or cannot be written.
    """
    chosen = check_backend(backend)
    folder = Path(os.path.realpath(folder))
    export = manifest.read(folder)
    sizes = (profile or Profile()).resolve(export.assembly.inputs)
    if verify:
        progress("verify the weights", 0, 1)
        export = manifest.verified(export)
    served = library.served(plugins) if plugins else frozenset()
    model, plugin_nodes = tensorrt_form(load(export), served)
    with write_errors(folder / PLAN), workspace(folder) as work:
        (work / MODEL).write_bytes(model.SerializeToString())
        shapes = {p.name: _shapes(p, sizes) for p in export.assembly.inputs}
        job = {"module": chosen.module, "model": str(folder / MODEL), "profile": shapes}
        job |= {"library": str(plugins)} if plugin_nodes else {}
        (work / "job.json").write_text(json.dumps(job))
        record = {
            "format": FORMAT,
            "backend": backend,
            "target": chosen.target,
            **{k: export.data[k] for k in ("arch", "block", "dtype", "inputs", "outputs")},
            "model_sha256": export.data["model_sha256"],
            "weights": export.data["weights"]["files"],
            "checked": export.checked,
            "profile": sizes,
            "plugins": [_library(plugins, plugin_nodes)] if plugins and plugin_nodes else [],
            **_run(work, chosen.module, export.assembly, plugin_nodes, timeout, progress),
            "plan": {"bytes": (work / PLAN).stat().st_size, "sha256": _sha256(work / PLAN)},
        }
        export.check_untouched()
        _place(work, folder, record)
    progress("engine", 2, 2)
    return record


def _library(path: Path, nodes: dict[str, str]) -> dict[str, Any]:
    """What engine.json says of the plugin library: it must be loaded before the engine is."""
    return {"file": str(path), "sha256": _sha256(path), "ops": dict(collections.Counter(nodes.values()))}


def _shapes(port: Port, sizes: Mapping[str, Sizes]) -> list[list[int]]:
    """Its least, best and largest shape."""
    return [[d if isinstance(d, int) else sizes[d][i] for d in port.shape] for i in range(3)]


def _run(
    work: Path,
    module: str,
    export: Assembly,
    plugin_nodes: dict[str, str],
    timeout: float | None,
    progress: Progress,
) -> dict[str, Any]:
    """Runs the job in `work`, which leaves the plan there; returns what `engine.json` says about the run."""
    start = time.monotonic()
    messages: collections.deque[str] = collections.deque(maxlen=20)
    facts: dict[str, Any] = {}
    built = False
    progress("engine: read", 0, 2)
    with _builder(work, module, timeout) as child:
        for line in child.stdout or ():
            if not line.endswith("\n"):
                # It died in the middle of an event.
                break
            match json.loads(line):
                case ["log", text]:
                    messages.append(text)
                    if ANOTHER_GRAPH.search(text):
                        raise EngineError(f"TensorRT would build another graph than the model's: {text}")
                case ["parsed", inputs, outputs, plugin_layers, facts]:
                    _check_plugins(plugin_nodes, plugin_layers)
                    _check_ports(export.inputs, inputs)
                    _check_ports(export.outputs, outputs)
                    progress("engine: build", 1, 2)
                case ["unreadable", reasons]:
                    raise EngineError(f"TensorRT cannot read the model: {'; '.join(reasons)}")
                case ["unbuildable"]:
                    raise EngineError("\n  ".join(["TensorRT cannot build the model:", *messages]))
                case ["unwritable", code]:
                    raise OSError(code, os.strerror(code))
                case ["built"]:
                    built = True
        code = child.wait()
    seconds = time.monotonic() - start
    if code or not built:
        late = timeout is not None and seconds >= timeout
        reason = f"was stopped after {timeout:g} s, see --timeout" if late else _reason(code)
        raise EngineError("\n  ".join([f"TensorRT's builder {reason}", *messages, *_tail(work / "stderr")]))
    return {**facts, "messages": list(dict.fromkeys(messages)), "seconds": round(seconds, 2)}


@contextlib.contextmanager
def _builder(work: Path, module: str, timeout: float | None) -> Iterator[subprocess.Popen[str]]:
    """The builder's process. It has ended afterwards, whatever happens."""
    pipe = subprocess.PIPE
    (work / "links").mkdir()
    with (
        open(work / "stderr", "xb") as stderr,
        # From `work`, as `-m` looks for modules where it is first.
        subprocess.Popen(
            [*COMMAND, str(work)],
            cwd=work,
            env=library.builder_environment(module, work / "links"),
            stdin=pipe,
            stdout=pipe,
            stderr=stderr,
            text=True,
        ) as child,
    ):
        timer = threading.Timer(timeout or 0, child.kill)
        try:
            if timeout is not None:
                timer.start()
            yield child
        finally:
            timer.cancel()
            child.kill()
            child.wait()


def _reason(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    return f"was killed by {name}" + (", as happens when memory runs out" if name == "SIGKILL" else "")


def _tail(path: Path) -> list[str]:
    """The last lines of a log of any size."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 4000))
        return file.read().decode(errors="replace").splitlines()[-20:]


def _check_plugins(nodes: dict[str, str], layers: list[str]) -> None:
    """Every node left to a plugin must be a plugin layer, and no other may."""
    if sorted(layers) != sorted(nodes):
        odd = sorted(set(nodes).symmetric_difference(layers))[:5]
        raise EngineError(f"TensorRT made {len(layers)} plugin layers of {len(nodes)} ops, see {', '.join(odd)}")


def _check_ports(ports: tuple[Port, ...], found: list[list[Any]]) -> None:
    """What TensorRT read, [name, type, shape with -1] each, must be what the export says."""
    said = {p.name: [p.dtype, [d if isinstance(d, int) else -1 for d in p.shape]] for p in ports}
    read = {name: [TYPES.get(kind, kind), shape] for name, kind, shape in found}
    for name in said | read:
        if said.get(name) != read.get(name):
            raise EngineError(f"TensorRT reads {name} as {read.get(name)}, the export says {said.get(name)}")


def _place(work: Path, folder: Path, record: dict[str, Any]) -> None:
    with open(work / RECORD, "x") as file:
        json.dump(record, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    # The record last: its digest of the plan says whether the two belong together.
    for name in (PLAN, RECORD):
        os.replace(work / name, folder / name)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
