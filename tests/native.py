"""Compiles what the tests of plugins/ need, once for each state of the sources."""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
SANITIZE = bool(os.environ.get("LLMEXPORT_TEST_SANITIZED"))  # whether this process runs under them


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


def compiled(name: str, sources: Sequence[Path], flags: Sequence[str] = ()) -> Path:
    """A program or, with -shared among the flags, a library; kept under build/ until a source changes."""
    need_cuda_headers()
    command = ["g++", "-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Wshadow", "-Werror", "-fPIC", "-pthread"]
    command += ["-I", str(PLUGINS), "-isystem", str(CUDA_INCLUDE)]
    digest = hashlib.sha256("\0".join([*command, *flags, *map(str, sources)]).encode())
    for path in sorted([*PLUGINS.rglob("*"), *(ROOT / "tests" / "plugins").rglob("*")]):
        if path.suffix in (".h", ".cuh", ".cpp", ".cu"):
            digest.update(path.read_bytes())
    target = ROOT / "build" / "tests" / f"{name}-{digest.hexdigest()[:16]}"
    with alone(name):
        if not target.exists():
            for old in target.parent.glob(f"{name}-{'?' * 16}"):
                old.unlink(missing_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                built = Path(folder) / name
                _compile(command, sources, flags, built)
                built.chmod(0o755)  # no library is loaded that others can write, as a umask may let them
                built.rename(target)
    return target


def _compile(command: list[str], sources: Sequence[Path], flags: Sequence[str], target: Path) -> None:
    """Each source for itself, as many at once as there are cores; those among the flags too."""
    units = [*sources, *(Path(f) for f in flags if f.endswith(".cpp"))]
    options = [f for f in flags if f.startswith("-") and not f.startswith("-Wl,")]
    linked = [f for f in flags if f not in options and not f.endswith(".cpp")]
    objects = [target.parent / f"{i}.o" for i in range(len(units))]

    def run(arguments: Sequence[str | Path]) -> None:
        done = subprocess.run([*command, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]

    def compile_one(unit: Path, made: Path) -> None:
        run([*options, "-x", "c++", "-c", unit, "-o", made])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, units, objects))
    run([*options, *linked, *objects, "-o", target])


def emulated_library(sanitize: bool = SANITIZE) -> Path:
    """The plugin library with its kernels on the CPU emulator."""
    flags = SANITIZED if sanitize else ()
    sources = {path for pattern in ("trt/*.cpp", "*/*.cu", "*/plugin.cpp") for path in PLUGINS.glob(pattern)}
    return compiled("plugins" + "-sanitized" * sanitize, sorted(sources), ["-shared", *EMULATED, *flags])


def beside_emulated(file: str) -> ctypes.CDLL:
    """The C functions that a file of tests/plugins has for a test, linked with the emulated library."""
    flags = [*(SANITIZED if SANITIZE else ()), "-DLLMEXPORT_EMULATED", "-Wno-unknown-pragmas"]
    linked = ["-shared", "-Wl,--no-as-needed", str(emulated_library())]
    source = ROOT / "tests" / "plugins" / file
    return ctypes.CDLL(str(compiled(source.stem + "-sanitized" * SANITIZE, [source], [*flags, *linked])))


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
    """Made by two jobs; if from nothing, with the sources and CPU seconds of that in whole_build.json beside it."""
    need_nvcc()
    if not shutil.which("cmake"):
        pytest.skip("no cmake: pip install cmake")
    with alone("cuda"):
        whole = not (folder / library.FILE).exists()
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        path = library.build(build_dir=folder, jobs=2)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if whole:
            seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            record = {"sources": library._builds().name, "seconds": seconds}
            (folder / "whole_build.json").write_text(json.dumps(record))
    return path


def seconds_to_build(scratch: Path) -> float:
    """CPU seconds of a whole build of these sources: the kept one's, or, if that is of older ones, one in `scratch`."""
    kept = cuda_library().parent / "whole_build.json"
    record = json.loads(kept.read_text()) if kept.exists() else {}
    if record.get("sources") != library._builds().name:
        record = json.loads((built(scratch).parent / "whole_build.json").read_text())
    return float(record["seconds"])


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
    return library.build([str(10 * major + minor)], ROOT / "build" / "tests" / "gpu")
