"""Compiles what the tests of plugins/ need, once for each state of the sources."""

import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from llmexport.plugins import library

ROOT = Path(__file__).parents[1]
PLUGINS = ROOT / "plugins"
CUDA_INCLUDE = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
# A kernel's rounding is stated operation by operation: no contraction into fma.
EMULATED = (
    "-DLLMEXPORT_EMULATED",
    "-DLLMEXPORT_SM90A",
    "-ffp-contract=off",
    "-Wno-unknown-pragmas",
    *map(str, sorted(PLUGINS.glob("cpu/*.cpp"))),
)
# A spill or a local array is an error, as in CMakeLists.txt.
GATE = ("-Werror=all-warnings", "-Xptxas=--warn-on-spills,--warn-on-local-memory-usage,--warning-as-error")
SM90A = ("-gencode=arch=compute_90a,code=sm_90a", *GATE)
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


def need_cuda_headers() -> None:
    if not shutil.which("g++"):
        pytest.skip("no g++: apt install g++")
    if not (CUDA_INCLUDE / "cuda_bf16.h").is_file():
        pytest.skip(f"no CUDA headers in {CUDA_INCLUDE}: install the CUDA toolkit, or set CUDA_HOME")


def compiled(name: str, sources: Sequence[Path], flags: Sequence[str] = ()) -> Path:
    """A program or, with -shared among the flags, a library; kept under build/ until a source changes."""
    need_cuda_headers()
    command = ["g++", "-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Wshadow", "-Werror", "-fPIC", "-pthread"]
    command += ["-I", str(PLUGINS), "-isystem", str(CUDA_INCLUDE), *flags, "-x", "c++", *map(str, sources)]
    digest = hashlib.sha256("\0".join(command).encode())
    for path in sorted([*PLUGINS.rglob("*"), *(ROOT / "tests" / "plugins").rglob("*")]):
        if path.suffix in (".h", ".cuh", ".cpp", ".cu"):
            digest.update(path.read_bytes())
    target = ROOT / "build" / "tests" / f"{name}-{digest.hexdigest()[:16]}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        for old in target.parent.glob(f"{name}-{'?' * 16}"):
            old.unlink(missing_ok=True)
        unfinished = target.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        unfinished.rename(target)
    return target


def emulated_library(flags: Sequence[str] = ()) -> Path:
    """The plugin library with its kernels on the CPU emulator."""
    sources = {path for pattern in ("trt/*.cpp", "*/*.cu", "*/plugin.cpp") for path in PLUGINS.glob(pattern)}
    return compiled("plugins" + "-sanitized" * bool(flags), sorted(sources), ["-shared", *EMULATED, *flags])


def need_nvcc() -> str:
    try:
        return library._nvcc()
    except library.PluginError as error:
        pytest.skip(str(error))


@functools.cache
def cuda_library() -> Path:
    """The plugin library as nvcc makes it for every architecture."""
    need_nvcc()
    if not shutil.which("cmake"):
        pytest.skip("no cmake: pip install cmake")
    return library.build(build_dir=ROOT / "build" / "tests" / "cuda", jobs=2)


def need_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def gpu_library(build_dir: Path) -> Path:
    """The plugin library for the GPU of this machine."""
    need_gpu()
    import torch

    major, minor = torch.cuda.get_device_capability()
    return library.build([str(10 * major + minor)], build_dir)
