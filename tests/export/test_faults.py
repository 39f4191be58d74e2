"""What the system refuses, as a user meets it: one line, wherever it is met."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from misuse import Situation, call, run_shell

from llmexport.export import archs, manifest, random_checkpoint
from llmexport.export.cli.console import Console


@pytest.fixture
def export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """A command, in a folder with its checkpoint."""
    monkeypatch.chdir(tmp_path)
    random_checkpoint.write(archs.load("gemma"), Path("ck"))
    return ("onnx", "--checkpoint", "ck", "-o", "out", "-q")


def raising(error: Exception) -> Callable[..., None]:
    def broken(*_: object) -> None:
        raise error

    return broken


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OSError(errno.EMFILE, os.strerror(errno.EMFILE), "x"),
            "x: Too many open files: raise the limit of open files",
        ),
        (OSError(errno.ELOOP, os.strerror(errno.ELOOP), "x"), "x: Too many levels of symbolic links: mend"),
        (OSError("no errno\nand a second line"), "no errno"),
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory (DefaultCPUAllocator"),
        (RuntimeError("std::bad_alloc"), "out of memory (std::bad_alloc)"),
        (ImportError("libx.so: failed to map segment from shared object"), "out of memory (libx.so"),
        (RuntimeError("can't start new thread"), "can't start new thread: raise the limit of processes"),
    ],
)
def test_what_the_system_refuses_is_one_line_wherever_it_is_met(
    error: Exception, words: str, export: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "as_data", raising(error))
    ended = call((*export, "--json"))
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert ended.err.startswith(f"error: {words}")
    assert json.loads(ended.out) == {"error": ended.err.removeprefix("error: ").removesuffix("\n")}


def test_what_an_error_was_raised_from_says_what_it_is(
    export: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a step failed") from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x")

    monkeypatch.setattr(manifest, "as_data", broken)
    ended = call(export)
    assert (ended.code, ended.err) == (2, "error: x: No space left on device: free space or choose another disk\n")


def test_a_name_cannot_forge_a_line_or_reach_the_terminal() -> None:
    ended = call(("onnx", "--arch", "gemma", "-o", "no\nerror: forged\x1b[31m/out", "-q"))
    assert (ended.code, ended.err.count("\n"), "\x1b" in ended.err) == (2, 1, False)


def test_json_has_no_word_that_json_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    Console(as_json=True).result({"theta": float("inf"), "nested": [float("nan"), (1.5, None)]})
    assert json.loads(capsys.readouterr().out) == {"theta": "inf", "nested": ["nan", [1.5, None]]}


def test_a_full_stderr_stops_the_progress_and_the_notes_and_not_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    full = open("/dev/full", "w")  # noqa: SIM115  what it holds cannot be written when it is closed either
    try:
        monkeypatch.setattr(sys, "stderr", full)
        console = Console()
        console.notes(["float16 may overflow"])
        console.progress("trace", 0, 2)
        console.progress("trace", 1, 2)
        Console().notes(["not compared"])
    finally:
        with suppress(OSError):
            full.close()


def test_a_note_that_quotes_a_config_stays_on_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    Console().notes(["left out is a\nnote: forged\x1b[31m"])
    assert capsys.readouterr().err == "note: left out is a\\nnote: forged\\x1b[31m\n"


def test_json_that_is_too_deep_is_one_line_and_endless_recursion_of_ours_is_a_bug(
    export: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    monkeypatch.setattr(manifest, "as_data", lambda *_: {"deep": deep, "weights": {"files": []}})
    ended = call(export)
    assert (ended.code, ended.err) == (2, "error: JSON is nested too deeply: is it the file that was meant?\n")

    def endless() -> None:
        endless()

    # Not endless(*_): Python 3.13.0 does not count a recursion that takes any arguments.
    monkeypatch.setattr(manifest, "as_data", lambda _: endless())
    ended = call(export)
    assert (ended.code, "RecursionError" in ended.err) == (3, True)


def test_help_without_arguments_is_no_error() -> None:
    ended = call(())
    assert (ended.code, ended.err, "Usage: llmexport" in ended.out) == (0, "", True)


@pytest.mark.parametrize("arguments", ["", " plugins"])
def test_help_without_arguments_that_cannot_be_printed_is_one_line(arguments: str) -> None:
    ended = run_shell(Situation("streams", "help", shell=f"$L{arguments} >/dev/full"))
    assert (ended.code, ended.err.count("\n"), "No space left" in ended.err) == (2, 1, True)


def test_a_usage_error_is_one_line_and_says_where_to_read_on() -> None:
    ended = call(("onnx", "--nosuch"))
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == "error: No such option '--nosuch': see `llmexport onnx --help`\n"
