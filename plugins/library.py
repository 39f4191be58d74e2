"""The plugin library: one shared object with the kernels of all ops, for TensorRT 10, 11 and TensorRT-RTX.

Imports neither torch nor TensorRT.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmexport.plugins import library_file
from llmexport.plugins.cache_folder import cache_folder, trusted_folder
from llmexport.plugins.declared import declared
from llmexport.plugins.errors import CacheError
from llmexport.plugins.errors import PluginError as PluginError

FILE = "libllmexport_plugins.so"
REGISTER = "libllmexport_register.so"  # registers FILE, which lies beside it, where a server only opens libraries
SOURCES = Path(__file__).parent
ARCHS = ("80", "86", "89", "90", "100", "110", "120")
NAMESPACE = "llmexport"
# A line of llmexportOps() in trt/library.cpp, by the name of its op and the version.
TABLE = re.compile(r"(\w+) (\d+)\(.*; .*\) -> .+")


def build(archs: Sequence[str] = ARCHS, build_dir: Path | None = None, jobs: int | None = None) -> Path:
    """Compiles the library for these SM versions ("90"; the last also as PTX) and returns its path.

    build_dir: a folder that is kept and used again; None takes the one for these versions and sources, where find()
    looks. Raises PluginError with the name of a missing tool, or with the compiler's message.
    """
    if not archs or not all(re.fullmatch(r"\d{2,3}[af]?", a) for a in archs):
        raise PluginError(f"archs are {','.join(archs)!r}: name SM versions, as in 80,90")
    archs = list(dict.fromkeys(archs))
    cmake = _tool("cmake", "pip install cmake")
    nvcc = _nvcc()
    if build_dir:
        folder = Path(os.path.abspath(build_dir))
    else:
        folder = trusted_folder("plugins", _builds().name, "-".join(archs))
    targets = ";".join([*(f"{a}-real" for a in archs[:-1]), archs[-1]])
    options = [f"-DCMAKE_CUDA_ARCHITECTURES={targets}", f"-DCMAKE_CUDA_COMPILER={nvcc}", "-DCMAKE_BUILD_TYPE=Release"]
    # The linker writes elsewhere, so that find() sees whole libraries only.
    linked = folder / "linked"
    options += [f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={linked}"]
    with library_file.locked(folder):
        for name in (FILE, REGISTER):
            library_file.drop_unless_placed(linked / name, folder / name)
        _run([cmake, "-S", str(SOURCES), "-B", str(folder), *options])
        _run([cmake, "--build", str(folder), "--parallel", str(jobs or os.cpu_count() or 1)])
        # What find() looks for is last.
        for name in (REGISTER, FILE):
            library_file.place(linked / name, folder / name, {"archs": archs, "sources": _builds().name})
    return folder / FILE


def find() -> Path | None:
    """The library that was installed with this package, else the last one that build() made of these sources.

    Raises CacheError if a built library lies where others can have written.
    """
    if (SOURCES / FILE).exists():
        return SOURCES / FILE
    try:
        builds = _builds()
    except CacheError:
        # Without a home nothing was built.
        return None
    found = max(builds.glob(f"*/{FILE}"), key=lambda path: path.stat().st_mtime, default=None)
    if found:
        trusted_folder("plugins", builds.name, found.parent.name, make=False)
    return found


def served(path: Path) -> frozenset[str]:
    """The ops that the library at `path` has plugins for.

    Raises PluginError if it is no plugin library of this version, computes another version of an op, is not whole, or
    if another user can have written it.
    """
    # Absolute, as the loader looks for a bare name elsewhere.
    path = Path(os.path.abspath(path))
    checked = library_file.check(path, library_file.writers(path))
    try:
        library = ctypes.CDLL(str(path))
        _, ops = library.getCreators, library.llmexportOps
    except OSError as error:
        raise PluginError(f"{path} is no plugin library: {error}. Build it: llmexport plugins build") from error
    except AttributeError as error:
        missing = f"no plugin library of this version: {error}"
        raise PluginError(f"{path} is {missing}. Build it anew: llmexport plugins build") from error
    if library_file.identity(os.stat(path)) != checked:
        raise PluginError(f"{path} was replaced while it was loaded: try again when nobody writes to it")
    ops.restype = ctypes.c_char_p
    lines = (ops() or b"").decode("ascii", "replace").splitlines()
    tables = [TABLE.fullmatch(line) for line in lines]
    if not tables or None in tables:
        odd = next((line for line, table in zip(lines, tables, strict=True) if not table), "")
        raise PluginError(f"{path} lists as an op {odd[:80]!r}: build it anew: llmexport plugins build")
    versions = {table[1]: int(table[2]) for table in tables if table}
    for op in declared():
        if (found := versions.get(op.name, op.version)) != op.version:
            raise PluginError(
                f"{path} has {op.name} of version {found}, not {op.version}: build it anew: llmexport plugins build"
            )
    return frozenset(versions)


def registering(path: Path) -> Path:
    """The library that registers the one at `path`, and lies beside it. Raises PluginError as `served` does."""
    register = Path(os.path.abspath(path)).with_name(REGISTER)
    library_file.check(register, library_file.writers(register))
    return register


def load(trt: Any, path: Path) -> frozenset[str]:
    """Registers the library with a TensorRT module (`tensorrt`, `tensorrt_rtx`); returns the ops it serves.

    A second time in one process it does nothing. Raises PluginError if TensorRT does not take it.
    """
    registry = trt.get_plugin_registry()
    path = Path(os.path.abspath(path))
    ops = served(path)
    if not ops <= _registered(registry) and registry.load_library(str(path)) is None:
        raise PluginError(f"{trt.__name__} {trt.__version__} cannot load {path}: is another library of ours loaded?")
    if missing := ops - _registered(registry):
        raise PluginError(f"{trt.__name__} {trt.__version__} has not registered {', '.join(sorted(missing))} of {path}")
    return ops


def builder_environment(module: str, spare: Path | None = None) -> dict[str, str]:
    """The environment in which a process can use plugins with this TensorRT module.

    TensorRT-RTX's parser opens libtensorrt_rtx.so at the first plugin and ends the process if there is none, but its
    wheel has libtensorrt_rtx.so.1 only: a folder with a link by that name goes on the library path. The folder is in
    the cache or, if no cache can be used, is `spare`: an empty folder of this user's.
    """
    environment = dict(os.environ)
    found = importlib.util.find_spec("tensorrt_rtx_libs") if module == "tensorrt_rtx" else None
    for place in found.submodule_search_locations or () if found else ():
        for real in Path(place).glob("libtensorrt_rtx.so.*"):
            paths = [str(_link_folder(real, spare)), environment.get("LD_LIBRARY_PATH", "")]
            environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, paths))
    return environment


def _registered(registry: Any) -> frozenset[str]:
    found = {(c.name, c.plugin_version) for c in registry.all_creators if c.plugin_namespace == NAMESPACE}
    versions = {op.name: str(op.version) for op in declared()}
    return frozenset(name for name, version in found if versions.get(name, version) == version)


def _link_folder(real: Path, spare: Path | None) -> Path:
    """A folder with a link to `real` under its name less the version, and nothing else that a loader could take."""
    name = real.with_suffix("").name
    try:
        folder = trusted_folder("links", hashlib.sha256(str(real).encode()).hexdigest()[:16])
    except CacheError:
        if spare is None:
            raise
        folder = spare
    try:
        if others := sorted({*os.listdir(folder)} - {name}):
            raise PluginError(f"{folder} holds {others[0]!r}, which is not ours: remove it")
        if not _leads(folder / name, real):
            # The link is made beside and renamed, as another process may do the same now.
            with tempfile.TemporaryDirectory(dir=folder.parent) as hidden:
                made = Path(hidden) / name
                made.symlink_to(real)
                os.replace(made, folder / name)
    except OSError as error:
        raise PluginError(f"cannot link {real} in {folder}: {error.strerror}: make room, or remove it") from error
    return folder


def _leads(link: Path, real: Path) -> bool:
    """Whether `link` is this user's and leads to `real`."""
    try:
        return os.readlink(link) == str(real) and os.lstat(link).st_uid == os.geteuid()
    except OSError:
        return False


def _builds() -> Path:
    """The folder of all builds of these sources."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.rglob("*")):
        if path.suffix in (".cu", ".cuh", ".cpp", ".h", ".map") or path.name == "CMakeLists.txt":
            digest.update(str(path.relative_to(SOURCES)).encode() + b"\0" + path.read_bytes())
    return cache_folder() / "plugins" / digest.hexdigest()[:16]


def _tool(name: str, install: str) -> str:
    found = shutil.which(name)
    if not found:
        raise PluginError(f"{name} is not installed: {install}")
    return found


def _nvcc() -> str:
    """The nvcc that $CUDACXX, $CUDA_HOME or the PATH names, or that lies where the toolkit installs itself.

    Raises PluginError if there is none, and if a variable names one that is not there.
    """
    home = os.environ.get("CUDA_HOME")
    for variable, named in (("CUDACXX", os.environ.get("CUDACXX")), ("CUDA_HOME", home and f"{home}/bin/nvcc")):
        if named:
            if found := shutil.which(named):
                return os.path.abspath(found)
            value = os.environ[variable]
            raise PluginError(f"{variable} is {value!r}, and {named!r} is no program: set it right, or unset it")
    for candidate in ("nvcc", "/usr/local/cuda/bin/nvcc"):
        if found := shutil.which(candidate):
            return os.path.abspath(found)
    raise PluginError(
        "nvcc is not installed: install the CUDA toolkit 12.8 or later (Debian and Ubuntu, from NVIDIA's repository: "
        "sudo apt install cuda-nvcc-13-0 cuda-cudart-dev-13-0), or set CUDACXX to yours"
    )


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        tail = "\n  ".join(done.stdout.strip().splitlines()[-15:])
        raise PluginError(f"`{' '.join(command[:2])}` failed with exit code {done.returncode}:\n  {tail}")
