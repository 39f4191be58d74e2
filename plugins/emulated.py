"""The plugin library with its kernels on the CPU emulator of cpu/: the same sources, as g++ compiles them."""

from __future__ import annotations

import os
from pathlib import Path

from llmexport.plugins import library, library_file
from llmexport.plugins.cache_folder import trusted_folder
from llmexport.plugins.errors import CacheError, PluginError

HEADER = "cuda_bf16.h"
TOOLKIT = Path("/usr/local/cuda")


def build(jobs: int | None = None) -> Path:
    """Compiles it where find() looks, and returns its path.

    Raises PluginError with the name of a missing tool, or with the compiler's message.
    """
    cmake = library._tool("cmake", "pip install cmake")
    library._tool("g++", "apt install g++")
    folder = trusted_folder("plugins", _name())
    linked = folder / "linked"
    # -O3 takes twice as long, and the emulator is no faster for it.
    options = ["-DLLMEXPORT_EMULATED=ON", f"-Dcuda_include={_headers()}", "-DCMAKE_CXX_FLAGS=-O1"]
    options += ["-DCMAKE_CXX_COMPILER=g++", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={linked}"]
    with library_file.locked(folder):
        library_file.drop_unless_placed(linked / library.FILE, folder / library.FILE)
        library._run([cmake, "-S", str(library.SOURCES), "-B", str(folder), *options])
        library._run([cmake, "--build", str(folder), "--parallel", str(jobs or os.cpu_count() or 1)])
        about = {"emulated": True, "sources": library._builds().name}
        library_file.place(linked / library.FILE, folder / library.FILE, about)
    return folder / library.FILE


def find() -> Path | None:
    """The one that build() made of these sources. Raises CacheError if others can have written where it lies."""
    try:
        path = library._builds().with_name(_name()) / library.FILE
    except CacheError:
        # Without a home nothing was built.
        return None
    if not path.exists():
        return None
    trusted_folder("plugins", _name(), make=False)
    return path


def missing() -> str:
    """What build() lacks here and how to get it, or nothing."""
    try:
        library._tool("cmake", "pip install cmake")
        library._tool("g++", "apt install g++")
        _headers()
    except PluginError as error:
        return str(error)
    return ""


def _name() -> str:
    # Beside the folder in which library.find() looks for libraries of a GPU.
    return f"{library._builds().name}-emulated"


def _headers() -> Path:
    """The folder of CUDA's headers. Raises PluginError if $CUDA_HOME, or else the toolkit's place, has none."""
    home = Path(os.environ.get("CUDA_HOME") or TOOLKIT)
    if not (home / "include" / HEADER).is_file():
        install = "from NVIDIA's repository: sudo apt install cuda-cudart-dev-13-0"
        toolkit = f"install the CUDA toolkit (Debian and Ubuntu, {install})"
        raise PluginError(f"no CUDA headers in {home / 'include'}: {toolkit}, or set CUDA_HOME to yours")
    return home / "include"
