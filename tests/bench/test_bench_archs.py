"""Costs of architectures in one file: measuring some of them leaves the others as they were."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return importlib.import_module("bench_archs")


def test_a_row_measured_anew_takes_the_place_of_its_own_alone(bench: Any) -> None:
    bert, llama = (bench.Cost(name, 1.0, 300.0, 0.5, "old") for name in ("bert", "llama"))
    slower, other = (bench.Cost(name, 2.0, 300.0, 0.5, "new") for name in ("llama", "gpt2"))
    assert bench.merged([bert, llama], slower) == [bert, slower]
    assert bench.merged([bert, llama], other) == [bert, other, llama]


def test_what_is_written_is_read_again(bench: Any, tmp_path: Path) -> None:
    rows = {k: [bench.Cost("bert", seconds + 1, 1.0, 0.5, "new")] for k, (seconds, _) in bench.LIMITS.items()}
    assert bench.write(tmp_path / "costs.json", rows) == {k: ["bert"] for k in bench.LIMITS}
    assert bench.earlier(tmp_path / "costs.json") == rows
    assert bench.earlier(tmp_path / "none.json") == {k: [] for k in bench.LIMITS}


def test_a_row_without_a_commit_is_of_that_of_the_file(bench: Any, tmp_path: Path) -> None:
    old = {"what": "bert", "cpu_s": 1.0, "peak_rss_mb": 300.0, "load": 0.5}
    (tmp_path / "costs.json").write_text(json.dumps({"commit": "old", **{k: [old] for k in bench.LIMITS}}))
    rows = bench.earlier(tmp_path / "costs.json")
    assert rows == {k: [bench.Cost("bert", 1.0, 300.0, 0.5, "old")] for k in bench.LIMITS}
