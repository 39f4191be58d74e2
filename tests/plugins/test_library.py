"""Building the library with nvcc, finding it, and what it shows to the outside."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import onnx.onnx_cpp2py_export
import pytest
from native import GATE, ROOT, cuda_tool, need_nvcc, time_to_build
from plugin_cases import plugins

from llmexport.plugins import library, library_file
from llmexport.plugins.library import PluginError

# Times of a file of one line, in CPU seconds: machines differ, and others may be at work. It was 251 when this was set.
MOST_TO_COMPILE = 310
MEGABYTES = 60
EMULATOR = ROOT / "tests" / "plugins" / "emulator"


def test_compiles_for_every_architecture(cuda_library: Path) -> None:
    """No warning, no spill, no local memory: CMakeLists.txt makes each an error."""
    assert library.served(cuda_library) == plugins()


@pytest.mark.slow
def test_compiles_in_time(tmp_path: Path) -> None:
    assert time_to_build(tmp_path) < MOST_TO_COMPILE


def test_is_small_enough_to_ship(cuda_library: Path) -> None:
    assert cuda_library.stat().st_size < MEGABYTES * 10**6


def test_holds_code_for_every_architecture_and_ptx_for_the_next(cuda_library: Path) -> None:
    """Of SM 90, which runs on all that come after."""
    listed = subprocess.run(
        [cuda_tool("cuobjdump"), "-lelf", "-lptx", cuda_library], capture_output=True, text=True, check=True
    ).stdout
    assert set(re.findall(r"sm_(\d+)\.cubin", listed)) == set(library.ARCHS)
    assert set(re.findall(r"sm_(\d+)\.ptx", listed)) == {"90"}


def test_shows_four_kinds_of_symbols_and_needs_no_tensorrt(cuda_library: Path) -> None:
    shown = subprocess.run(
        ["nm", "-D", "--defined-only", cuda_library], capture_output=True, text=True, check=True
    ).stdout
    names = {re.sub("(?<=^llmexportHost).+", "", line.split()[-1]) for line in shown.splitlines()}
    assert names == {"getCreators", "llmexportHost", "llmexportOps", "setLoggerFinder"}
    needed = subprocess.run(["readelf", "-d", cuda_library], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"NEEDED.*(nvinfer|tensorrt|cuda)", needed)


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("variable", "value", "program"),
    [("CUDACXX", "/nowhere/nvcc", "/nowhere/nvcc"), ("CUDA_HOME", "/no", "/no/bin/nvcc")],
)
def test_a_variable_that_names_no_nvcc_is_an_error(variable, value, program, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(PluginError, match=f"{variable} is '{value}', and '{program}' is no program"):
        library.build(["90"], tmp_path)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What build() runs; it links shared objects of nobody's."""
    ran: list[list[str]] = []

    def run(command: list[str]) -> None:
        ran.append(command)
        for option in command:
            if option.startswith("-DCMAKE_LIBRARY_OUTPUT_DIRECTORY="):
                linked = Path(option.split("=")[1])
                linked.mkdir(exist_ok=True)
                for name in (library.FILE, library.REGISTER):
                    shutil.copyfile(onnx.onnx_cpp2py_export.__file__, linked / name)

    monkeypatch.setattr(library, "_run", run)
    monkeypatch.setattr(library, "_nvcc", lambda: "/usr/bin/nvcc")
    monkeypatch.setattr(library, "_tool", lambda name, install: name)
    return ran


@pytest.mark.parametrize(
    ("archs", "targets"), [("80,80", "80"), ("90,90a,90", "90-real;90a"), ("80,90,80", "80-real;90")]
)
def test_an_architecture_named_twice_is_built_once(archs, targets, commands, tmp_path: Path) -> None:
    library.build(archs.split(","), tmp_path / "build")
    assert f"-DCMAKE_CUDA_ARCHITECTURES={targets}" in commands[0]
    assert all((tmp_path / "build" / name).is_file() for name in (library.FILE, library.REGISTER))


def test_a_build_that_fails_leaves_the_earlier_library(commands, monkeypatch, tmp_path: Path) -> None:
    path = library.build(["90"], tmp_path)
    before = path.read_bytes()

    def half_linked(command: list[str]) -> None:
        (tmp_path / "linked" / library.FILE).write_bytes(before[:1000])
        raise PluginError("killed")

    monkeypatch.setattr(library, "_run", half_linked)
    with pytest.raises(PluginError, match="killed"):
        library.build(["90"], tmp_path)
    assert path.read_bytes() == before
    library.library_file.check(path, {0, os.geteuid()})


def test_two_builds_in_one_folder_do_not_meet(commands, tmp_path: Path) -> None:
    with library_file.locked(tmp_path), pytest.raises(PluginError, match="another build is under way"):
        library.build(["90"], tmp_path)


def test_a_build_where_nothing_can_be_written_is_one_line(commands, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PluginError, match=r"cannot build in .*file.*Not a directory.*: make room, or name another"):
        library.build(["90"], tmp_path / "file" / "build")


@pytest.fixture
def cached(commands, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A library in the cache, which the loader must not touch."""
    monkeypatch.setenv("LLMEXPORT_CACHE", str(tmp_path / "cache"))
    path = library.build(["90"])
    assert library.find() == path
    monkeypatch.setattr(library.ctypes, "CDLL", lambda path: pytest.fail(f"{path} was loaded"))
    return path


def test_a_truncated_library_is_not_loaded(cached: Path) -> None:
    os.truncate(cached, 100_000)
    with pytest.raises(PluginError, match="is cut or changed: build it: llmexport plugins build"):
        library.served(library.find())


def test_a_library_that_others_can_write_is_not_loaded(cached: Path) -> None:
    cached.chmod(0o777)
    with pytest.raises(PluginError, match="can be written by others, and is not loaded"):
        library.served(library.find())


def test_another_users_library_is_not_loaded_by_root_either(cached: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give a file away")
    os.chown(cached, 12345, 12345)
    with pytest.raises(PluginError, match=r"belongs to uid 12345, neither to root nor to you .*, and is not loaded"):
        library.served(library.find())


def test_a_library_in_a_folder_that_others_can_write_is_not_found(cached: Path) -> None:
    cached.parents[3].chmod(0o777)
    with pytest.raises(PluginError, match="can be written by others, and is not used: chmod 700"):
        library.find()


def test_a_library_that_was_replaced_while_it_was_loaded_is_refused(cached: Path, monkeypatch) -> None:
    class Replaced:
        def __init__(self, path: str) -> None:
            os.utime(path, (0, 0))
            self.getCreators = self.llmexportOps = None

    monkeypatch.setattr(library.ctypes, "CDLL", Replaced)
    with pytest.raises(PluginError, match="was replaced while it was loaded"):
        library.served(cached)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A wheel of TensorRT-RTX: its library, without the name that its parser opens."""
    real = tmp_path / "wheel" / "libtensorrt_rtx.so.1"
    real.parent.mkdir()
    real.touch()
    found = importlib.machinery.ModuleSpec("tensorrt_rtx_libs", None, is_package=True)
    found.submodule_search_locations = [str(real.parent)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    monkeypatch.setenv("LLMEXPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    return real


def linked(folder: str) -> Path:
    return Path(os.readlink(Path(folder) / "libtensorrt_rtx.so"))


@pytest.mark.parametrize("planted", [False, True])
def test_the_builder_finds_the_wheels_own_library(planted: bool, runtime: Path) -> None:
    folder = library.builder_environment("tensorrt_rtx")["LD_LIBRARY_PATH"]
    if planted:
        (Path(folder) / "libtensorrt_rtx.so").unlink()
        (Path(folder) / "libtensorrt_rtx.so").symlink_to("/evil.so")
        assert library.builder_environment("tensorrt_rtx")["LD_LIBRARY_PATH"] == folder
    assert linked(folder) == runtime


def test_another_library_beside_the_link_is_refused(runtime: Path) -> None:
    folder = library.builder_environment("tensorrt_rtx")["LD_LIBRARY_PATH"]
    (Path(folder) / "libcuda.so.1").touch()
    with pytest.raises(PluginError, match=r"holds 'libcuda.so.1', which is not ours: remove it"):
        library.builder_environment("tensorrt_rtx")


def test_without_a_cache_the_link_is_where_the_builder_works(runtime: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("LLMEXPORT_CACHE", str(runtime / "no folder"))
    spare = tmp_path / "work" / "links"
    spare.mkdir(parents=True)
    assert library.builder_environment("tensorrt_rtx", spare)["LD_LIBRARY_PATH"] == str(spare)
    assert linked(str(spare)) == runtime
    with pytest.raises(PluginError, match="set LLMEXPORT_CACHE"):
        library.builder_environment("tensorrt_rtx")


def test_what_is_no_plugin_library_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.so"
    other.write_bytes(b"no library")
    with pytest.raises(PluginError, match="is no plugin library"):
        library.served(other)
    with pytest.raises(PluginError, match="is no plugin library"):
        library.served(Path("libm.so.6"))


@pytest.mark.parametrize(
    ("symbols", "says"),
    [
        ("void getCreators() {}", "is no plugin library of this version: .*: undefined symbol: llmexportOps. Build it"),
        ("void llmexportOps() {}", "is no plugin library of this version: .*: undefined symbol: getCreators. Build it"),
        ("void getCreators() {} char const* llmexportOps() { return nullptr; }", "lists as an op '': build it anew"),
        ('void getCreators() {} char const* llmexportOps() { return ""; }', "lists as an op '': build it anew"),
        (
            'void getCreators() {} char const* llmexportOps() { return "A 1(; ) -> y\\nB"; }',
            "lists as an op 'B': build",
        ),
        (
            'void getCreators() {} char const* llmexportOps() { return "SinkAttention 1(; ) -> y"; }',
            "has SinkAttention of version 1, not 2: build it anew: llmexport plugins build",
        ),
    ],
)
def test_a_library_of_another_version_is_one_line(symbols: str, says: str, tmp_path: Path) -> None:
    if not shutil.which("g++"):
        pytest.skip("no g++: apt install g++")
    source, other = tmp_path / "other.cpp", tmp_path / "other.so"
    source.write_text(f'extern "C" {{ {symbols} }}')
    subprocess.run(["g++", "-shared", "-fPIC", source, "-o", other], check=True)
    other.chmod(0o755)
    with pytest.raises(PluginError, match=says):
        library.served(other)


def test_finds_what_was_built_of_these_sources_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sources = tmp_path / "plugins"
    shutil.copytree(library.SOURCES, sources, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    monkeypatch.setattr(library, "SOURCES", sources)
    monkeypatch.setenv("LLMEXPORT_CACHE", str(tmp_path / "cache"))
    assert library.find() is None
    built = library._builds() / "90" / library.FILE
    built.parent.mkdir(parents=True, mode=0o700)
    built.touch()
    assert library.find() == built
    (sources / "rope" / "rope.cuh").write_text("// changed")
    assert library.find() is None
