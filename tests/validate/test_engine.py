"""The process that runs an engine: started only where that can be, and whatever it dies of is one line."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import toy_model
from engine_folder import PLAN, make_engine

from llmexport.export import device, engine_backend, engine_record
from llmexport.export.device import Device
from llmexport.export.errors import EngineError
from llmexport.validate import engine
from llmexport.validate.pack import BITS

CHILD = Path(__file__).parent.parent / "engine_child.py"
NO_GPU = "no GPU is found here, libcuda.so.1 is not installed"


def serve(monkeypatch: pytest.MonkeyPatch, dtype: str = "float16", fault: str = "") -> None:
    """Lets the stand-in run in place of TensorRT."""
    monkeypatch.setattr(engine, "COMMAND", (sys.executable, str(CHILD), dtype, fault))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_engine(tmp_path / "out")


def prompt(dtype: str = "float16") -> dict[str, np.ndarray]:
    past = np.zeros((2, 2, 0, 8), BITS.get(dtype, dtype))
    return {"input_ids": np.arange(10).reshape(2, 5), "past": past}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_session_gives_what_the_process_computes(dtype: str, tmp_path: Path, monkeypatch) -> None:
    folder = make_engine(tmp_path / "out", dtype=dtype)
    serve(monkeypatch, dtype)
    with engine.started(folder, engine_record.read(folder)) as session:
        found = session.run("model", prompt(dtype))
        again = session.run("model", {"input_ids": np.array([[1], [2]]), "past": found["present"]})
    right = toy_model.run(prompt(dtype), dtype)
    assert all((found[n] == right[n]).all() for n in right)
    assert again["present"].shape == (2, 2, 6, 8)
    assert session.seconds == 0.25


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("version", "was built by tensorrt-rtx 1.7.1.116, 1.6.0 is installed here: install that version"),
        ("crash", "the process that runs the engine was killed by SIGSEGV\n  CUDA error 700"),
        ("hang", "the process that runs the engine gave no answer in 3 s"),
        ("lost", "the process that runs the engine ended with exit code 1"),
    ],
)
def test_what_goes_wrong_in_the_process_is_an_error_and_the_process_is_gone(
    fault: str, says: str, folder: Path, monkeypatch
) -> None:
    serve(monkeypatch, fault=fault)
    before = {p.pid for p in psutil.Process().children()}
    with (
        pytest.raises(EngineError, match=re.escape(says)),
        engine.started(folder, engine_record.read(folder), timeout=3 if fault == "hang" else 60) as session,
    ):
        session.run("model", prompt())
    assert {p.pid for p in psutil.Process().children()} <= before


def test_a_feed_that_a_dead_process_does_not_read_is_no_second_error(folder: Path, monkeypatch) -> None:
    serve(monkeypatch)
    large = {"input_ids": np.zeros((1, 500_000), np.int64), "past": prompt()["past"]}
    with engine.started(folder, engine_record.read(folder)) as session:
        session._child.kill()
        session._child.wait()
        with pytest.raises(EngineError, match="was killed by SIGKILL"):
            session.run("model", large)


def test_the_process_ends_with_whoever_started_it(folder: Path, monkeypatch) -> None:
    serve(monkeypatch)
    with engine.started(folder, engine_record.read(folder)) as session:
        child = psutil.Process(session._child.pid)
        assert session._child.stdin
        # As the system does with the pipes of a process that is gone.
        session._child.stdin.close()
        assert child.wait(timeout=20) == 0


def test_the_real_process_says_in_one_line_that_a_module_is_missing(folder: Path) -> None:
    """It is started as on a GPU; here its TensorRT is one that is not installed."""
    if engine_backend.importlib.util.find_spec("tensorrt"):
        pytest.skip("tensorrt is installed")
    other = dataclasses.replace(engine_record.read(folder), backend="tensorrt")
    with pytest.raises(EngineError, match="ended with exit code 1\n") as error, engine.started(folder, other):
        pass
    assert "No module named 'tensorrt'" in str(error.value)


def test_the_real_process_says_its_version_before_it_is_given_a_plan(folder: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    other = dataclasses.replace(engine_record.read(folder), version="0.1")
    says = f"was built by tensorrt-rtx 0.1, {importlib.metadata.version('tensorrt_rtx')} is installed here"
    with pytest.raises(EngineError, match=re.escape(says)), engine.started(folder, other):
        pass


def test_without_a_gpu_one_line_says_so(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(device, "first", lambda: NO_GPU)
    with pytest.raises(EngineError) as error:
        engine.check(folder)
    assert str(error.value) == f"{NO_GPU}: run this where the engine is to run"


def test_a_plan_that_is_another_is_said_before_the_gpu_is_asked_for(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(device, "first", lambda: pytest.fail("the GPU was asked for"))
    (folder / PLAN).write_bytes(b"x")
    with pytest.raises(EngineError, match="has 1 bytes"):
        engine.check(folder)


def test_an_engine_that_can_run_here_is_checked_by_what_is_installed_and_the_gpu(folder: Path, monkeypatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(device, "first", lambda: Device("H200", (9, 0)))
    assert engine.check(folder) == (engine_record.read(folder), "")
    monkeypatch.setattr(device, "first", lambda: Device("T4", (7, 5)))
    with pytest.raises(EngineError, match=r"here is T4 \(compute capability 7\.5\)"):
        engine.check(folder)
