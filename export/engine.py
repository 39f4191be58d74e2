"""From an export to a TensorRT engine: `model.plan` and `engine.json`, in the export's own folder.

The builder runs in a process of its own (`engine_build.py`), so that its crash is an error and not ours.
"""

from __future__ import annotations

import collections
import hashlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import onnx
import onnx.inliner
from google.protobuf.message import DecodeError

from llmexport.export import manifest
from llmexport.export.errors import EngineError
from llmexport.export.onnx_file import MODEL, Progress
from llmexport.export.output import write_errors
from llmexport.export.spec import BATCH, PAST, SEQUENCE, TOTAL, Port

PLAN = "model.plan"
RECORD = "engine.json"
FORMAT = 1


@dataclass(frozen=True)
class Backend:
    """A flavour of TensorRT: its module, the command that installs it, and the GPUs that its plans run on."""

    module: str
    install: str
    target: str


BACKENDS = MappingProxyType(
    {
        "tensorrt-rtx": Backend(
            "tensorrt_rtx", "pip install tensorrt-rtx", "any NVIDIA GPU of compute capability 8.0 or later"
        ),
        "tensorrt": Backend(
            "tensorrt",
            "pip install tensorrt --extra-index-url https://pypi.nvidia.com (it builds only where a GPU is)",
            "a GPU like the one it was built on",
        ),
    }
)

Sizes = tuple[int, int, int]
DEFAULTS: Mapping[str, Sizes] = MappingProxyType({BATCH: (1, 1, 4), SEQUENCE: (1, 64, 512), PAST: (0, 512, 2048)})


@dataclass(frozen=True)
class Profile:
    """The sizes that an engine takes and is tuned for: (min, opt, max) of dynamic dimensions by name.

    What is not named has its sizes from `DEFAULTS`; `total` is past + sequence and cannot be named.
    """

    sizes: Mapping[str, Sizes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, (low, opt, high) in self.sizes.items():
            said = f"profile says {name}={low}:{opt}:{high}"
            least = 0 if name == PAST else 1
            if name == TOTAL:
                raise EngineError(f"{said}, but {TOTAL} is {PAST} + {SEQUENCE}: name those")
            if not least <= low <= opt <= high < 2**31:
                raise EngineError(f"{said}: make it {least} <= min <= opt <= max < 2**31")

    def resolve(self, ports: Iterable[Port]) -> dict[str, Sizes]:
        """The sizes of every dynamic dimension of these ports. Raises EngineError on one that they lack."""
        dims = {d for p in ports for d in p.shape if isinstance(d, str)}
        free = dims - {TOTAL} | ({PAST, SEQUENCE} if TOTAL in dims else set())
        if stray := sorted(set(self.sizes) - free):
            raise EngineError(
                f"profile names {', '.join(stray)}: the dynamic dimensions of this export are {', '.join(sorted(free))}"
            )
        sizes = {d: s for d, s in {**DEFAULTS, **self.sizes}.items() if d in free}
        if unsaid := sorted(free - set(sizes)):
            raise EngineError(f"{', '.join(unsaid)} has no default sizes: name it in --profile")
        if TOTAL in dims:
            (a, b, c), (x, y, z) = sizes[PAST], sizes[SEQUENCE]
            sizes[TOTAL] = (a + x, b + y, c + z)
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


def build(
    folder: Path,
    *,
    backend: str = "tensorrt-rtx",
    profile: Profile | None = None,
    timeout: float | None = None,
    progress: Progress,
) -> dict[str, Any]:
    """Builds an engine of the export in `folder` and writes it there; returns what `engine.json` says.

    timeout: seconds until the builder is given up, None to wait. Whatever fails, an earlier engine stays as it was.
    Raises EngineError, and ExportError if `folder` is no export, was changed since, or cannot be written.
    """
    chosen = BACKENDS[backend]
    if importlib.util.find_spec(chosen.module) is None:
        raise EngineError(f"{backend} is not installed: {chosen.install}")
    folder = Path(os.path.realpath(folder))
    export = manifest.read(folder)
    inputs, outputs = export.assembly.inputs, export.assembly.outputs
    sizes = (profile or Profile()).resolve(inputs)
    shapes = {p.name: [[d if isinstance(d, int) else sizes[d][i] for d in p.shape] for i in range(3)] for p in inputs}
    data = _read_model(folder / MODEL)
    job = {"module": chosen.module, "model": str(folder / MODEL), "profile": shapes}
    hidden = tempfile.TemporaryDirectory(prefix=".llmexport-", dir=folder)
    with write_errors(folder / PLAN), hidden as temporary:
        work = Path(temporary)
        (work / "job.json").write_text(json.dumps(job))
        (work / MODEL).write_bytes(tensorrt_form(data).SerializeToString())
        start = time.monotonic()
        facts = _run(work, inputs, outputs, timeout, progress)
        record = {
            "format": FORMAT,
            "backend": backend,
            "version": facts.version,
            "target": chosen.target,
            "arch": export.data["arch"],
            "block": export.data["block"],
            "dtype": export.dtype,
            "model_sha256": hashlib.sha256(data).hexdigest(),
            "plan": {"file": PLAN, "bytes": (work / PLAN).stat().st_size, "sha256": _sha256(work / PLAN)},
        }
    return record
