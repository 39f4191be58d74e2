"""Building the library with nvcc, finding it, and what it shows to the outside."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from native import GATE, ROOT, cuda_library, cuda_tool, need_nvcc, seconds_to_build
from plugin_cases import served

from llmexport.plugins import library
from llmexport.plugins.library import PluginError

# With two cores to itself; CPU seconds, as others may be at work.
MINUTES_TO_COMPILE, CORES = 6, 2
MEGABYTES = 60
EMULATOR = ROOT / "tests" / "plugins" / "emulator"


def test_compiles_for_every_architecture() -> None:
    """No warning, no spill, no local memory: CMakeLists.txt makes each an error."""
    assert library.served(cuda_library()) == served()


@pytest.mark.slow
def test_compiles_in_time(tmp_path: Path) -> None:
    assert seconds_to_build(tmp_path) < MINUTES_TO_COMPILE * 60 * CORES


def test_is_small_enough_to_ship() -> None:
    assert cuda_library().stat().st_size < MEGABYTES * 10**6


def test_holds_code_for_every_architecture_and_ptx_for_the_next() -> None:
    path = cuda_library()
    listed = subprocess.run(
        [cuda_tool("cuobjdump"), "-lelf", "-lptx", path], capture_output=True, text=True, check=True
    ).stdout
    assert set(re.findall(r"sm_(\d+)\.cubin", listed)) == set(library.ARCHS)
    assert set(re.findall(r"sm_(\d+)\.ptx", listed)) == {library.ARCHS[-1]}


def test_shows_two_symbols_and_needs_no_tensorrt() -> None:
    path = cuda_library()
    shown = subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True).stdout
    assert sorted(line.split()[-1] for line in shown.splitlines()) == ["getCreators", "setLoggerFinder"]
    needed = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"NEEDED.*(nvinfer|tensorrt|cuda)", needed)


@pytest.mark.parametrize("arch", ["80", "120"])
def test_tensor_core_and_copy_instructions_compile(arch: str, tmp_path: Path) -> None:
    """The PTX of common/, which so far only the emulator's tests use."""
    command = [need_nvcc(), "-std=c++17", f"-arch=sm_{arch}", "-I", ROOT / "plugins", *GATE]
    subprocess.run([*command, "-c", EMULATOR / "check.cu", "-o", tmp_path / "check.o"], check=True)


def test_missing_nvcc_names_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None if "nvcc" in name else f"/usr/bin/{name}")
    with pytest.raises(PluginError, match=r"nvcc is not installed: .*sudo apt install cuda-nvcc"):
        library.build(["90"], tmp_path)


def test_missing_cmake_names_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(PluginError, match="cmake is not installed: pip install cmake"):
        library.build(["90"], tmp_path)


def test_cmake_alone_says_how_to_get_nvcc(tmp_path: Path) -> None:
    cmake = shutil.which("cmake")
    if not cmake:
        pytest.skip("no cmake")
    command = [cmake, "-S", ROOT / "plugins", "-B", tmp_path, "-DCMAKE_CUDA_COMPILER=CMAKE_CUDA_COMPILER-NOTFOUND"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "sudo apt install cuda-nvcc" in " ".join(done.stderr.split())


@pytest.mark.parametrize("archs", [[], ["sm_90"], ["native"], ["90;rm"]])
def test_refuses_what_is_no_architecture(archs: list[str], tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="name SM versions, as in 80,90"):
        library.build(archs, tmp_path)


def test_compiler_error_is_in_the_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    need_nvcc()
    monkeypatch.setattr(library, "SOURCES", tmp_path)
    with pytest.raises(PluginError, match=r"failed with exit code 1:\n(.|\n)*CMakeLists.txt"):
        library.build(["90"], tmp_path / "build")


def test_what_is_no_plugin_library_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.so"
    other.write_bytes(b"no library")
    with pytest.raises(PluginError, match="is no plugin library"):
        library.served(other)
    with pytest.raises(PluginError, match="is no plugin library"):
        library.served(Path("libm.so.6"))


def test_finds_what_was_built_of_these_sources_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sources = tmp_path / "plugins"
    shutil.copytree(library.SOURCES, sources, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    monkeypatch.setattr(library, "SOURCES", sources)
    monkeypatch.setenv("LLMEXPORT_CACHE", str(tmp_path / "cache"))
    assert library.find() is None
    built = library._builds() / "90" / library.FILE
    built.parent.mkdir(parents=True)
    built.touch()
    assert library.find() == built
    (sources / "rope" / "rope.cuh").write_text("// changed")
    assert library.find() is None
