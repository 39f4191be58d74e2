"""What a report says beside its rungs: of the export, of the engine beside it, and of what ran here."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections import Counter
from pathlib import Path
from typing import Any

from llmexport.export import engine_record
from llmexport.export.engine_record import RECORD
from llmexport.export.errors import EngineError
from llmexport.export.exported import Export

RUNS = (
    *("llmexport", "numpy", "torch", "transformers", "onnx", "onnxruntime", "onnxruntime-gpu"),
    *("polygraphy", "tensorrt-rtx", "tensorrt"),
)


def facts(export: Export) -> dict[str, Any]:
    """JSON data: `model`, `fusions`, `engine`, `files` and `environment`."""
    said = {name: getattr(export, name) for name in ("arch", "block", "dtype", "target", "opset", "versions", "notes")}
    blocks = Counter(s.block.kind for s in export.steps)
    return {
        "model": said | {"ops": {g.name: g.ops for g in export.graphs}, "blocks": blocks},
        "fusions": [
            {"graph": g.name, "pass": name.removeprefix("fuse_"), "fused": fused.count, "refused": fused.refused}
            for g in export.graphs
            for name, fused in g.fusions.items()
        ],
        "engine": engine(export),
        "files": files(export),
        "environment": environment(),
    }


def engine(export: Export) -> dict[str, Any]:
    """The engines beside the export, of each graph; or under `none` why there are none to speak of."""
    try:
        record = engine_record.read(export.folder)
    except EngineError as error:
        return {"none": str(error)}
    plans = record.graphs
    if {n: p.model_sha256 for n, p in plans.items()} != {g.name: g.sha256 for g in export.graphs}:
        return {"none": f"{RECORD} is of another export than this: {engine_record.rebuild(export.folder, record)}"}
    said = {name: getattr(record, name) for name in ("backend", "version", "target", "weights_at")}
    kept = ("file", "bytes", "layers", "plugins", "messages")
    return {**said, "plans": {n: {k: getattr(plan, k) for k in kept} for n, plan in plans.items()}}


def files(export: Export) -> list[dict[str, Any]]:
    """What the export wrote, and the plans beside it, the largest first."""
    what = {w.file: f"weights, {w.placed}" for w in export.weights}
    what |= dict.fromkeys(export.companions, "of the checkpoint")
    what |= {g.file: "graph" for g in export.graphs}
    plans = {f"{g.name}.plan": "engine" for g in export.graphs} | {RECORD: "what the engine is"}
    what |= {name: said for name, said in plans.items() if (export.folder / name).is_file()}
    listed = [
        {"file": name, "bytes": (export.folder / name).stat().st_size, "what": what.get(name, "what the export is")}
        for name in {*export.files, *what}
    ]
    return sorted(listed, key=lambda f: (-f["bytes"], f["file"]))


def environment() -> dict[str, str]:
    """What the rungs ran on: the machine and the libraries that are installed."""
    found = {d: _version(d) for d in RUNS}
    return {
        "Python": platform.python_version(),
        **{name: version for name, version in found.items() if version},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.1f} GB",
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """Its name, as Linux says it, or as Python does."""
    said = Path("/proc/cpuinfo")
    text = said.read_text() if said.is_file() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
