"""llmexport doctor"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import shutil
from dataclasses import asdict, dataclass

import click

from llmexport.export import device
from llmexport.export.cli.console import Console, size, talkative
from llmexport.export.device import DRIVER
from llmexport.export.engine_backend import BACKENDS
from llmexport.plugins.cache_folder import cache_folder, trusted_folder
from llmexport.plugins.errors import CacheError

# What each command needs, the distributions that serve it, and the command that installs one.
PACKAGES = (
    ("onnx, validate", ("torch",), "pip install torch"),
    ("onnx", ("onnx",), "pip install onnx"),
    ("onnx", ("onnxscript",), "pip install onnxscript"),
    ("onnx", ("onnx-graphsurgeon",), "pip install onnx-graphsurgeon"),
    ("validate", ("onnxruntime-gpu", "onnxruntime"), "pip install onnxruntime-gpu"),
    ("validate", ("polygraphy",), "pip install polygraphy"),
    ("validate, generate", ("jinja2",), "pip install jinja2"),
    ("generate", ("tokenizers",), "pip install tokenizers"),
    ("engine", ("tensorrt-rtx",), "pip install tensorrt-rtx"),
)
OPTIONAL = (
    ("engine --backend tensorrt", ("tensorrt",), "pip install tensorrt --extra-index-url https://pypi.nvidia.com"),
    ("the rung against transformers", ("transformers",), "pip install transformers"),
)
TOOLS = (
    ("nvcc", "install NVIDIA's CUDA toolkit, 12.8 or later: https://developer.nvidia.com/cuda-downloads"),
    ("cmake", "pip install cmake"),
    ("g++", "apt install g++"),
)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for. `fix` is the command that brings it; it may be absent if not `needed`."""

    what: str
    found: str
    needed: bool
    used_by: str
    fix: str


@click.command("doctor")
@talkative
def command(quiet: bool, as_json: bool) -> int:
    """Say what is installed, what is missing, and the command that fixes it. Exit code 2 if something is missing."""
    console = Console(quiet, as_json)
    findings = examine()
    console.table(
        "doctor",
        ("what", "found", "for", "to fix"),
        [(f.what, f.found or ("MISSING" if f.needed else "not there"), f.used_by, f.fix) for f in findings],
    )
    console.result([asdict(f) for f in findings])
    return 2 if any(f.needed and not f.found for f in findings) else 0


def examine() -> list[Finding]:
    """All findings, in the order in which they matter."""
    findings = [Finding("python", platform.python_version(), True, "all", "")]
    for needed, group in ((True, PACKAGES), (False, OPTIONAL)):
        for used_by, names, fix in group:
            found = next((f"{n} {v}" for n in names if (v := _version(n))), "")
            findings.append(Finding(names[0], found, needed, used_by, "" if found else fix))
    for tool, fix in TOOLS:
        path = shutil.which(tool) or ""
        findings.append(Finding(tool, path, False, "plugins build", "" if path else fix))
    driver = _loadable(DRIVER)
    findings.append(Finding("NVIDIA driver", driver, False, "running engines", "" if driver else "a GPU machine"))
    if driver:
        findings.append(_gpu())
    findings.append(_cache())
    return findings


def _gpu() -> Finding:
    here = device.first()
    if isinstance(here, str):
        return Finding("GPU", "", False, "running engines", here)
    remarks = (f"engines of {name} run {said}" for name, b in BACKENDS.items() if (said := b.remark(here)))
    return Finding("GPU", here.text, False, "running engines", "; ".join(remarks))


def _loadable(library: str) -> str:
    """Its name, if it can be loaded; ctypes.util.find_library would ask a compiler for one that is not there."""
    try:
        ctypes.CDLL(library)
    except OSError:
        return ""
    return library


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cache() -> Finding:
    try:
        folder = cache_folder()
        if folder.exists():
            trusted_folder(make=False)
    except (CacheError, OSError) as error:
        return Finding("trace cache", "", False, "fast exports", str(error))
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    if not os.access(existing, os.W_OK):
        return Finding("trace cache", "", False, "fast exports", f"set LLMEXPORT_CACHE: {folder} cannot be written")
    held = sum(p.stat().st_size for p in folder.glob("*")) if folder.exists() else 0
    free = shutil.disk_usage(existing).free
    return Finding("trace cache", f"{folder}: {size(held)}, {size(free)} free", False, "fast exports", "")
