"""Rung `engine`: as any form of an export where it can run, and named with the reason where it cannot.

ONNX Runtime computes the graphs in the process of the engine, in place of TensorRT.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from engine_folder import add_engine

from llmexport.export import device, manifest
from llmexport.export.device import Device
from llmexport.export.exported import Export
from llmexport.export.spec import Sizes
from llmexport.validate import engine, engine_form, ladder
from llmexport.validate.report import Report

pytestmark = pytest.mark.model

CHILD = Path(__file__).parent.parent / "onnx_child.py"
PROFILE = {"batch": (1, 1, 4), "sequence": (1, 64, 512), "past": (0, 512, 2048), "total": (1, 576, 2560)}
NO_GPU = "no GPU is found here, libcuda.so.1 is not installed"


@pytest.fixture
def folder(exported, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported("llama"), tmp_path / "export"))


def climb(
    folder: Path, monkeypatch: pytest.MonkeyPatch, factor: float = 1.0, profile: Mapping[str, Sizes] = PROFILE
) -> Report:
    """The ladder of an export with an engine, on a machine with a GPU."""
    pytest.importorskip("tensorrt_rtx")
    add_engine(manifest.read(folder), profile)
    monkeypatch.setattr(device, "first", lambda: Device("H200", (9, 0)))
    monkeypatch.setattr(engine, "COMMAND", (sys.executable, str(CHILD), str(factor)))
    return ladder.climb(manifest.read(folder), rungs=["engine"])


def test_a_right_engine_passes_the_same_comparison_as_every_form(folder: Path, monkeypatch) -> None:
    report = climb(folder, monkeypatch)
    [rung] = report.rungs
    assert (rung.key, rung.name, rung.status, rung.note) == ("engine", "engine / ONNX Runtime", "pass", "")
    assert rung.difference
    assert rung.difference.max_abs == 0
    assert rung.metrics
    assert (rung.metrics.top1, rung.metrics.kl_max) == (1, 0)
    assert report.seconds["engine"] == {"prefill": 0.5, "decode": 0.5}


def test_wrong_numbers_of_an_engine_fail(folder: Path, monkeypatch) -> None:
    assert [r.status for r in climb(folder, monkeypatch, factor=1.01).rungs] == ["fail"]


def test_stages_outside_of_the_profile_are_not_run_and_are_named(folder: Path, monkeypatch) -> None:
    # A window of the config beyond what the prompt has, and beyond what the engine takes.
    found = manifest.read(folder)
    far = {**found.text_config, "original_max_position": 300}
    monkeypatch.setattr(manifest, "read", lambda folder: dataclasses.replace(found, text_config=far))
    short = PROFILE | {"past": (0, 100, 200), "total": (1, 164, 700)}
    [rung] = climb(folder, monkeypatch, profile=short).rungs
    assert rung.status == "pass"
    assert rung.note == "not run across 300, as past is 298, the engine takes 0 to 200"


def test_an_engine_that_does_not_take_the_prompt_is_not_run(folder: Path, monkeypatch) -> None:
    [rung] = climb(folder, monkeypatch, profile=PROFILE | {"sequence": (1, 1, 16)}).rungs
    assert (rung.status, rung.note) == ("not run", "prompt: sequence is 67, the engine takes 1 to 16")


SEES = PROFILE | {
    "tiles": (1, 4, 4),
    "features": (1, 36, 36),
    "spliced": (0, 36, 36),
    "features_times_4": (4, 144, 144),
    "images": (1, 3, 4),
}


@pytest.mark.parametrize(("change", "note"), [
    ({}, ""),
    ({"tiles": (1, 3, 3)}, "prompt: tiles is 4, the engine takes 1 to 3"),
    ({"spliced": (1, 36, 36)}, "decode 1: spliced is 0, the engine takes 1 to 36"),
])  # fmt: skip
def test_an_engine_takes_the_pictures_of_a_prompt_and_none_in_later_steps(
    change: dict[str, Sizes], note: str, exported, tmp_path: Path, monkeypatch
) -> None:
    folder = Path(shutil.copytree(exported("llama4", part="all"), tmp_path / "export"))
    [rung] = climb(folder, monkeypatch, profile=SEES | change).rungs
    assert (rung.status, rung.note) == ("not run" if note else "pass", note)


def unable(folder: Path) -> str:
    return engine_form.unable(manifest.read(folder))


def test_where_the_engine_cannot_run_one_line_says_why(folder: Path, monkeypatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(device, "first", lambda: NO_GPU)
    assert unable(folder) == f"{folder} holds no engine: build one: llmexport engine {folder}"
    export: Export = manifest.read(folder)
    add_engine(export, PROFILE)
    assert unable(folder) == f"{NO_GPU}: run this where the engine is to run"
    monkeypatch.setattr(device, "first", lambda: Device("H200", (9, 0)))
    assert unable(folder) == ""
    [graph] = export.graphs
    add_engine(dataclasses.replace(export, graphs=(dataclasses.replace(graph, sha256="0" * 64),)), PROFILE)
    assert re.match("it was built of another export than lies there now: build it again: ", unable(folder))


def test_a_report_without_a_gpu_names_the_rung_and_does_not_claim_that_it_ran(folder: Path, monkeypatch) -> None:
    add_engine(manifest.read(folder), PROFILE)
    monkeypatch.setattr(device, "first", lambda: NO_GPU)
    report = ladder.climb(manifest.read(folder), rungs=["onnxruntime", "engine"])
    assert [(r.key, r.status) for r in report.rungs] == [("onnxruntime", "pass"), ("engine", "not run")]
    assert "engine" not in report.seconds
    # It was asked for, and did not run.
    assert not report.passed
