"""The library on the emulator is built once, found again, and never taken for that of a GPU."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from native import need_cuda_headers
from plugin_cases import OPS, served

from llmexport.export.cli.plugins import command
from llmexport.plugins import emulated, library
from llmexport.plugins.library import CacheError, PluginError


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLMEXPORT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """What build() runs, with all tools there; it links a shared object of nobody's."""
    ran: list[list[str]] = []

    def run(command: list[str]) -> None:
        ran.append(command)
        for option in command:
            if option.startswith("-DCMAKE_LIBRARY_OUTPUT_DIRECTORY="):
                made = Path(option.partition("=")[2]) / library.FILE
                made.parent.mkdir(parents=True, exist_ok=True)
                made.write_bytes(b"linked")

    (tmp_path / "cuda" / "include").mkdir(parents=True)
    (tmp_path / "cuda" / "include" / "cuda_bf16.h").touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setattr(library, "_run", run)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    return ran


def test_nothing_is_found_before_it_is_built() -> None:
    assert emulated.find() is None


def test_what_is_built_is_found_and_is_no_library_of_a_gpu(commands: list[list[str]]) -> None:
    made = emulated.build(jobs=3)
    assert emulated.find() == made
    assert made.read_bytes() == b"linked"
    assert library.find() is None
    assert "-DLLMEXPORT_EMULATED=ON" in commands[0]
    assert commands[1][-2:] == ["--parallel", "3"]


def test_that_of_other_sources_is_not_found(
    commands: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    emulated.build()
    (tmp_path / "sources").mkdir()
    monkeypatch.setattr(library, "SOURCES", tmp_path / "sources")
    assert emulated.find() is None


def test_one_that_others_can_write_is_refused(commands: list[list[str]]) -> None:
    emulated.build().parent.chmod(0o777)
    with pytest.raises(CacheError, match="can be written by others"):
        emulated.find()


@pytest.mark.parametrize(
    ("without", "says"),
    [("cmake", "cmake is not installed: pip install cmake"), ("g++", r"g\+\+ is not installed: apt install g\+\+")],
)
def test_a_missing_tool_is_named_with_its_command(
    without: str, says: str, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None if name == without else f"/usr/bin/{name}")
    with pytest.raises(PluginError, match=says):
        emulated.build()
    assert emulated.missing()


def test_missing_headers_are_named_with_where_they_were_looked_for(
    commands: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert emulated.missing() == ""
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    says = f"no CUDA headers in {tmp_path}/include: install the CUDA toolkit .*, or set CUDA_HOME to yours"
    with pytest.raises(PluginError, match=says):
        emulated.build()
    assert emulated.missing()


def test_the_command_line_takes_no_sm_versions_beside_it() -> None:
    result = CliRunner().invoke(command, ["build", "--emulated", "--archs", "90"])
    assert result.exit_code == 2
    assert "--emulated takes neither --archs nor --build-dir: leave them out" in result.output


@pytest.mark.slow
def test_the_command_line_compiles_the_ops_that_there_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One, as the tests compile all of them by the same CMakeLists.txt."""
    need_cuda_headers()
    others = ["normed_moe_experts", "normed_moe_route", *(OPS[op].torch_name for op in served() - {"GatedAct"})]
    shutil.copytree(library.SOURCES, tmp_path / "plugins", ignore=shutil.ignore_patterns(*others))
    monkeypatch.setattr(library, "SOURCES", tmp_path / "plugins")
    result = CliRunner().invoke(command, ["build", "--emulated"])
    assert result.exit_code == 0, result.output
    assert library.served(emulated.find()) == {"GatedAct", "JoinedGatedAct"}
