"""A pipe or a device where a command reads a file: refused as what it is, before anything waits for it."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llmexport.export import archs, random_checkpoint
from llmexport.export.cli.main import main

SHARD, INDEX = "model-00001-of-00001.safetensors", "model.safetensors.index.json"
READ = {
    "onnx": ("config.json", INDEX, SHARD),
    "engine": ("manifest.json", "model.onnx"),
    "validate": ("manifest.json", "model.onnx"),
}


@contextmanager
def at_once() -> Iterator[None]:
    """What waits for a pipe fails."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(60)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    random_checkpoint.write(archs.load("llama"), tmp_path / "ck")
    return tmp_path / "ck"


def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["llmexport", *map(str, arguments)])
    capsys.readouterr()  # what making the export said
    with at_once(), pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    return capsys.readouterr().err


def put(kind: str, path: Path) -> None:
    path.unlink(missing_ok=True)
    if kind == "a named pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", ["a named pipe", "a character device"])
@pytest.mark.parametrize(("command", "name"), [(c, n) for c, names in READ.items() for n in names])
def test_it_is_refused_as_what_it_is(kind, command, name, checkpoint, exported, tmp_path, capsys, monkeypatch) -> None:
    if command == "onnx":
        folder, options = checkpoint, ["--checkpoint", checkpoint, "-o", tmp_path / "out"]
    else:
        folder = Path(shutil.copytree(exported("llama"), tmp_path / "export", copy_function=os.link))
        options = [folder]
    put(kind, folder / name)
    error = said(capsys, monkeypatch, command, "-q", *options)
    assert error.startswith(f"error: cannot read {folder / name}: it is {kind}, not a regular file: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["a named pipe", "a character device"])
def test_a_config_to_write_weights_for_must_be_a_file(kind, tmp_path, capsys, monkeypatch) -> None:
    put(kind, tmp_path / "x")
    error = said(capsys, monkeypatch, "checkpoint", "--config", tmp_path / "x", "-o", tmp_path / "out")
    assert (
        error
        == f"error: cannot read the config {tmp_path / 'x'}: it is {kind}, not a regular file: give a config.json\n"
    )
