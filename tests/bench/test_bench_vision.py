"""What bench_vision.py says of the tiny towers, and what it writes, with sections that stand in for those that take
minutes."""

from __future__ import annotations

import importlib
import json
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import runner

from llmexport.export import archs, manifest
from llmexport.validate.compare import compare
from llmexport.validate.tolerance import TOLERANCE

HERE = Path(__file__).parent
CHOSEN = Namespace(calls=1, threads=1)
Rows = dict[str, Any]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(HERE))
    return importlib.import_module("bench_vision")


@pytest.fixture
def in_process(bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> Any:
    """The same, but every command and runner runs here, and pictures are 32 pixels a side."""
    runs, run = importlib.import_module("vision_runs"), runner(monkeypatch, capsys)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "SIDE", 32)

    def done(*arguments: str | Path, log: Path) -> None:
        code, _, said = run(*arguments)
        assert code == 0, said

    for module in (bench, importlib.import_module("bench_families")):
        monkeypatch.setattr(module, "done", done)

    def seen(runner: str, source: Path, out: Path, feed: Any, chosen: Namespace) -> Any:
        return runs.measured(runner, source, manifest.read(out), feed, chosen.calls)

    monkeypatch.setattr(bench, "seen", seen)
    return bench


def tiny(arch: str) -> Rows:
    whole: Rows = json.loads(json.dumps(archs.tiny_config(archs.load(arch), "all"), default=dict))
    return whole


@pytest.mark.model
@pytest.mark.parametrize(
    ("arch", "count", "pixels", "features"),
    [
        ("qwen3_5_moe", 4, [4 * 64, 96], [4 * 16, 64]),
        ("llama4", 1, [5, 3, 24, 24], [5 * 9, 64]),
        ("gemma3_text", 1, [1, 3, 24, 24], [9, 64]),
    ],
)
def test_tower_alone_is_held_against_transformers(
    in_process: Any, tmp_path: Path, arch: str, count: int, pixels: list[int], features: list[int]
) -> None:
    found = in_process.image(tmp_path, tiny(arch), CHOSEN, count)
    assert (found["passed"], found["pixels"], found["features"]) == (True, pixels, features)
    assert list(found["runs"]) == ["transformers", "PyTorch", "ONNX Runtime", "ONNX Runtime, its target"]
    for run in (found["runs"]["ONNX Runtime"], found["runs"]["ONNX Runtime, its target"]):
        assert 0 < run["rms_ratio"] < 1e-5
        assert 0 < sum(run["ops"].values()) <= 1.01
    assert "Attention" not in run["ops"]


def test_shares_are_those_of_the_last_call_and_leave_out_what_takes_no_time(bench: Any, tmp_path: Path) -> None:
    def kernel(op: str, start: int, time: int) -> Rows:
        return {"cat": "Node", "name": "n_kernel_time", "ts": start, "dur": time, "args": {"op_name": op}}

    def call(start: int) -> Rows:
        return {"cat": "Session", "name": "model_run", "ts": start, "dur": 100}

    events = [call(0), kernel("Conv", 1, 90), call(200), kernel("Attention", 201, 60), kernel("MatMul", 261, 200)]
    events += [kernel("MatMul", 470, 135), kernel("Add", 610, 3), kernel("Mul", 620, 2)]
    events.append({**kernel("MatMul", 261, 900), "name": "n_fence_before"})
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps(events))
    shares = importlib.import_module("vision_runs").shares(str(profile))
    assert list(shares.items()) == [("MatMul", 0.838), ("Attention", 0.15)]


@pytest.mark.slow
@pytest.mark.model
def test_sixteen_bits_are_held_against_those_of_transformers(in_process: Any, tmp_path: Path) -> None:
    found = in_process.sixteen(tmp_path, tiny("qwen3_5_moe"), CHOSEN, 1)
    assert found["passed"]
    errors = {name: run["rms_ratio"] for name, run in found["runs"].items()}
    assert list(errors) == [f"{r}, {d}" for d in ("float16", "bfloat16") for r in ("transformers", "PyTorch")]
    assert 1e-5 < errors["PyTorch, float16"] < errors["PyTorch, bfloat16"] < 0.1


@pytest.mark.slow
@pytest.mark.model
def test_a_hollow_checkpoint_costs_what_its_parts_do(bench: Any, tmp_path: Path) -> None:
    parts = bench.hollow(tmp_path, tiny("qwen3_5_moe"), CHOSEN, 1)["parts"]
    assert {name: part["graphs"] for name, part in parts.items()} == {
        "all": ["vision", "decoder"],
        "text": ["model"],
        "vision": ["vision"],
    }
    assert all(part["cpu_s"] > 0.1 and part["peak_rss_mb"] > 30 for part in parts.values())


@pytest.mark.parametrize(
    ("name", "pixels", "grids"),
    [
        ("Qwen/Qwen3.6-35B-A3B", (3 * 28 * 28, 3 * 2 * 16 * 16), [[1, 28, 28]] * 3),
        # Two by two tiles of 336, and the whole, as Llama4ImageProcessor cuts each.
        ("meta-llama/Llama-4-Scout-17B-16E-Instruct", (3 * 5, 3, 336, 336), None),
    ],
)
def test_pictures_are_those_of_the_processor(bench: Any, name: str, pixels: tuple[int, ...], grids: Any) -> None:
    made = bench.pictures(bench.published(name), 3)
    assert made["pixel_values"].shape == pixels
    assert made.get("grid_thw", np.array(None)).tolist() == grids


def test_features_that_are_off_or_memory_beyond_the_limit_fail(bench: Any) -> None:
    features = np.arange(1.0, 9.0)
    small, large = ({"runs": {"PyTorch": {"peak_rss_mb": size}}} for size in (1000.0, 25_800.0))

    def passed(found: Rows, error: float) -> bool:
        difference = compare(features, features + error)
        return bool(bench.judged(found, [(difference, TOLERANCE["float32"])])["passed"])

    assert [passed(small, 1e-6), passed(small, 1e-3), passed(large, 1e-6)] == [True, False, False]


@pytest.fixture
def run(bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[Any, Rows]]:
    """Runs the program over sections that stand in: exit code, and what is in its file."""
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "results.json")

    def call(*arguments: str, passed: bool = True) -> tuple[Any, Rows]:
        def section(work: Path, config: Rows, chosen: Namespace, count: int) -> Rows:
            return {"depth": config["vision_config"].get("depth"), "passed": passed}

        monkeypatch.setattr(bench, "SECTIONS", dict.fromkeys(bench.SECTIONS, section))
        monkeypatch.setattr(sys, "argv", ["bench_vision.py", "--work", str(tmp_path), *arguments])
        with pytest.raises(SystemExit) as ended:
            bench.main()
        written = tmp_path / "results.json"
        return ended.value.code, json.loads(written.read_bytes()) if written.exists() else {}

    return call


def test_rows_of_what_was_not_run_stay(run: Callable[..., tuple[Any, Rows]]) -> None:
    code, record = run("--only", "image", "35b")
    assert (code, [(r["model"], r["pictures"]) for r in record["image"]]) == (
        0,
        [("Qwen/Qwen3.6-35B-A3B", 1), ("Qwen/Qwen3.6-35B-A3B", 4)],
    )
    code, record = run("--only", "hollow", "scout", passed=False)
    assert (code, len(record["image"]), len(record["hollow"])) == (1, 2, 1)
    assert {"cpu", "cores", "load_average", "memory_mb"} < record.keys()


def test_a_try_of_few_layers_leaves_the_results(run: Callable[..., tuple[Any, Rows]], capsys: Any) -> None:
    assert run("--only", "sixteen", "--layers", "2", "35b") == (0, {})
    assert json.loads(capsys.readouterr().out)["depth"] == 2


def test_a_name_of_no_model_is_told(run: Callable[..., tuple[Any, Rows]], capsys: Any) -> None:
    assert run("mistral") == (2, {})
    assert "no model has mistral in its name: choose of Qwen/Qwen3.6-35B-A3B" in capsys.readouterr().err
