"""Compiles what the tests of plugins/ need."""

import contextlib
import ctypes
import fcntl
import functools
import json
import os
import resource
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmexport.plugins import library

ROOT = Path(__file__).parents[1]
PLUGINS = ROOT / "plugins"
CUDA_INCLUDE = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
# A spill or a local array is an error, as in CMakeLists.txt.
GATE = ("-Werror=all-warnings", "-Xptxas=--warn-on-spills,--warn-on-local-memory-usage,--warning-as-error")
SM90A = ("-gencode=arch=compute_90a,code=sm_90a", *GATE)
SANITIZE = bool(os.environ.get("LLMEXPORT_TEST_SANITIZED"))  # whether this process runs under them
# In which the emulator runs threads in another order; under sanitizers fewer, as the addresses are the same in each.
ORDERS = range(2 if SANITIZE else 4)


def need_cuda_headers() -> None:
    if not shutil.which("g++"):
        pytest.skip("no g++: apt install g++")
    if not (CUDA_INCLUDE / "cuda_bf16.h").is_file():
        pytest.skip(f"no CUDA headers in {CUDA_INCLUDE}: install the CUDA toolkit, or set CUDA_HOME")


@contextlib.contextmanager
def alone(name: str) -> Iterator[None]:
    """Held by one process at a time: several test processes want the same library at once, and one makes it."""
    folder = ROOT / "build" / "tests"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@functools.cache
def compiled(target: str, sanitize: bool = SANITIZE) -> Path:
    """A program or library that tests/plugins/CMakeLists.txt names, made anew where a source of it has changed."""
    need_cuda_headers()
    cmake, ninja = tool("cmake"), tool("ninja")
    if not cmake:
        pytest.skip("no cmake: pip install cmake")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else ["-G", "Unix Makefiles"]
    folder = ROOT / "build" / "tests" / ("sanitized" if sanitize else "plain") / ("ninja" if ninja else "make")
    configure = [cmake, "-S", ROOT / "tests" / "plugins", "-B", folder, f"-DSANITIZED={sanitize}", *generator]
    configure += [f"-DCMAKE_{kind}_OUTPUT_DIRECTORY={folder}" for kind in ("LIBRARY", "RUNTIME")]
    build = [cmake, "--build", folder, "--target", target, "--parallel", str(os.cpu_count())]
    with alone(folder.parent.name):
        for command in (configure, build):
            # No library is loaded that others can write, as a umask may let them.
            done = subprocess.run(command, capture_output=True, text=True, umask=0o022)
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    library = folder / f"lib{target}.so"
    return library if library.exists() else folder / target


def emulated_library(sanitize: bool = SANITIZE) -> Path:
    """The plugin library with its kernels on the CPU emulator."""
    return compiled("llmexport_plugins", sanitize)


def beside_emulated(file: str) -> ctypes.CDLL:
    """The C functions that a file of tests/plugins has for a test, linked with the emulated library."""
    return ctypes.CDLL(str(compiled(Path(file).stem)))


def tool(name: str) -> str | None:
    """A program, of the PATH or installed beside this Python."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


def need_nvcc() -> str:
    try:
        return library._nvcc()
    except library.PluginError as error:
        pytest.skip(str(error))


def cuda_tool(name: str) -> str:
    """A tool of the toolkit, from it or from its wheel."""
    wheels = [str(p) for p in Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin")]
    found = shutil.which(
        name, path=os.pathsep.join([*wheels, os.environ.get("PATH", ""), str(CUDA_INCLUDE.parent / "bin")])
    )
    if not found:
        pytest.skip(f"no {name}: pip install nvidia-cuda-{name}")
    return found


@functools.cache
def cuda_library() -> Path:
    """The plugin library as nvcc makes it for every architecture, in a folder that is kept."""
    return built(ROOT / "build" / "tests" / "cuda")


def built(folder: Path) -> Path:
    """Made by two jobs; if from nothing, with the sources of that, and its CPU time over that of a small file of which
    one is compiled before it and one behind, in whole_build.json beside it."""
    need_nvcc()
    if not shutil.which("cmake"):
        pytest.skip("no cmake: pip install cmake")
    with alone("cuda"):
        whole = not (folder / library.FILE).exists()
        small = [small_build()] if whole else []
        before = cpu_of_children()
        path = library.build(build_dir=folder, jobs=2)
        seconds = cpu_of_children() - before
        if whole:
            small.append(small_build())
            record = {"sources": library._builds().name, "seconds": seconds, "of_small": 2 * seconds / sum(small)}
            (folder / "whole_build.json").write_text(json.dumps(record))
    return path


def cpu_of_children() -> float:
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def small_build() -> float:
    """CPU seconds of nvcc for a file of one line: how fast this machine is now."""
    before = cpu_of_children()
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "small.cu"
        source.write_text("#include <cuda_bf16.h>\n")
        command = ["nvcc", "-std=c++17", "-arch=sm_90", "-c", str(source), "-o", f"{source}.o"]
        subprocess.run(command, check=True, capture_output=True)
    return cpu_of_children() - before


def time_to_build(scratch: Path) -> float:
    """A whole build's CPU time over a small one's: of the kept one, or, if its sources are older, one in `scratch`."""
    kept = cuda_library().parent / "whole_build.json"
    record = json.loads(kept.read_text()) if kept.exists() else {}
    if record.get("sources") != library._builds().name or "of_small" not in record:
        record = json.loads((built(scratch).parent / "whole_build.json").read_text())
    return float(record["of_small"])


def need_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@functools.cache
def gpu_library() -> Path:
    """The plugin library for the GPU of this machine."""
    need_gpu()
    import torch

    major, minor = torch.cuda.get_device_capability()
    with alone("gpu"):
        return library.build([str(10 * major + minor)], ROOT / "build" / "tests" / "gpu")
