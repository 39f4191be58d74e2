"""Hidden folders: gone with their owner, whatever ends it, and never before."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llmexport.export import workspace as module
from llmexport.export.workspace import FOREIGN, OWNER, exchange, sweep, workspace

# What the next run finds of one that was killed in the middle of its work.
KILLED = """
import os, signal, sys
from pathlib import Path
from llmexport.export.workspace import workspace
with workspace(Path(sys.argv[1]), Path(sys.argv[1]) / "out") as work:
    (work / "copied").write_text("weights")
    if sys.argv[2:]:
        os.rename(Path(sys.argv[1]) / "out", work / "old")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(folder: Path, *options: str) -> Path:
    """The workspace of a process that was killed there."""
    run = subprocess.run([sys.executable, "-c", KILLED, str(folder), *options])
    assert run.returncode == -signal.SIGKILL
    [left] = folder.glob(".llmexport-*")
    assert (left / "copied").is_file()
    return left


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_workspace_is_a_new_folder_that_is_gone_afterwards(tmp_path: Path) -> None:
    with workspace(tmp_path) as work:
        assert names(work) == [OWNER]
        (work / "sub").mkdir()
    assert names(tmp_path) == []


def test_the_next_run_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    killed(tmp_path)
    with workspace(tmp_path) as work:
        assert names(tmp_path) == [work.name]


def test_the_next_run_puts_back_what_a_killed_one_had_moved_away(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/model.onnx").write_text("old")
    killed(tmp_path, "move")
    assert not (tmp_path / "out").exists()
    sweep(tmp_path)
    assert (tmp_path / "out/model.onnx").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_an_output_that_was_made_since_is_not_replaced_by_an_old_one(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    killed(tmp_path, "move")
    (tmp_path / "out").write_text("since")
    sweep(tmp_path)
    assert (tmp_path / "out").read_text() == "since"


def test_the_workspace_of_a_live_process_stays(tmp_path: Path) -> None:
    code = KILLED.replace("os.kill(os.getpid(), signal.SIGKILL)", "print('here', flush=True); sys.stdin.read()")
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=pipe, stdout=pipe) as process:
        assert process.stdout
        assert process.stdin
        process.stdout.readline()
        sweep(tmp_path)
        assert len(list(tmp_path.glob(".llmexport-*/copied"))) == 1
        process.stdin.close()
        assert process.wait(10) == 0
    assert names(tmp_path) == []


def test_ones_own_workspace_stays(tmp_path: Path) -> None:
    with workspace(tmp_path) as first, workspace(tmp_path) as second:
        assert names(tmp_path) == sorted([first.name, second.name])


@pytest.mark.parametrize("text", [None, "", "{", "[]}", '{"boot": "of this machine"}'])
def test_one_whose_owner_is_not_known_stays(tmp_path: Path, text: str | None) -> None:
    left = killed(tmp_path)
    (left / OWNER).unlink()
    if text is not None:
        (left / OWNER).write_text(text)
    sweep(tmp_path)
    assert (left / "copied").exists()


def test_one_that_could_not_be_locked_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: object, how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(module.fcntl, "flock", refuse)
    with workspace(tmp_path) as work:
        monkeypatch.undo()
        sweep(tmp_path)
        assert work.is_dir()


def test_one_of_another_machine_stays_for_a_week(tmp_path: Path) -> None:
    left = killed(tmp_path)
    said = json.loads((left / OWNER).read_text())
    (left / OWNER).write_text(json.dumps(said | {"boot": "another"}))
    sweep(tmp_path)
    assert left.is_dir()
    before = time.time() - FOREIGN - 60
    os.utime(left, (before, before))
    sweep(tmp_path)
    assert not left.exists()


def test_one_of_another_user_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = killed(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: left.stat().st_uid + 1)
    sweep(tmp_path)
    assert left.is_dir()


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    killed(tmp_path / "elsewhere").rename(tmp_path / "elsewhere/left")
    (tmp_path / ".llmexport-0").symlink_to("elsewhere/left")
    sweep(tmp_path)
    assert (tmp_path / "elsewhere/left/copied").exists()


@pytest.mark.parametrize("name", ["../out", "/etc/out", ".."])
def test_nothing_is_put_back_outside_the_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "home/out").mkdir(parents=True)
    left = killed(tmp_path / "home", "move")
    said = json.loads((left / OWNER).read_text())
    (left / OWNER).write_text(json.dumps(said | {"target": name}))
    sweep(tmp_path / "home")
    assert names(tmp_path) == ["home"]


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.write_text(path.name)])
def test_two_change_places_in_one_step(tmp_path: Path, make: Callable[[Path], object]) -> None:
    for name in "ab":
        make(tmp_path / name)
    before = [(tmp_path / n).stat().st_ino for n in "ab"]
    assert exchange(tmp_path / "a", tmp_path / "b")
    assert [(tmp_path / n).stat().st_ino for n in "ba"] == before


def test_what_cannot_change_places_stays(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert not exchange(tmp_path / "a", tmp_path / "b")
    assert names(tmp_path) == ["a"]
