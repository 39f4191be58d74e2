"""What bench_ops.py writes, and when, by cases and times that stand in for those of a GPU."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
FASTER = "where faster"
Bench = Callable[..., dict[str, Any]]


class Cut(Exception):
    """The call's time is up."""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    """Runs bench_ops.py over four cases and returns what is in its file; `until` is the case at which it is cut off."""
    monkeypatch.syspath_prepend(str(HERE))
    ops, clock, op_cases = (importlib.import_module(n) for n in ("bench_ops", "gpu_clock", "op_cases"))
    from llmexport.plugins import host, library

    limits = clock.Ceilings(1.0, 1.0, 1.0, 1.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(library, "build", lambda archs, folder: tmp_path)
    monkeypatch.setattr(host, "Library", lambda path: path)
    monkeypatch.setattr(clock, "ceilings", lambda: limits)
    monkeypatch.setattr(ops, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(ops, "right", lambda case, built: True)

    def run(*arguments: str, seconds: float = 1.0, until: int = 4, kernels: str = "these") -> dict[str, Any]:
        out = Path(arguments[-1]) if "--out" in arguments else tmp_path / "results" / "some-gpu.json"

        def timed(case: Any, built: object, with_peers: bool) -> dict[str, dict[str, float]]:
            if until == case.B:
                raise Cut
            return {"seconds": {"llmexport": seconds}, "bounds": {}}

        cases = [
            SimpleNamespace(op=op, family="F", B=b, T=1, bytes=1, target=1.0, floor=lambda ceilings: 1.0)
            for b, op in enumerate(("Rope", "Rope", "MoeRoute", "MoeRoute"))
        ]
        monkeypatch.setattr(op_cases, "cases", lambda: cases)
        monkeypatch.setattr(ops, "timed", timed)
        monkeypatch.setattr(library, "_builds", lambda: Path(kernels))
        monkeypatch.setattr(sys, "argv", ["bench_ops.py", *arguments])
        with contextlib.suppress(Cut):
            assert ops.main() == (0 if seconds <= 1 else 1)
        return json.loads(out.read_text())

    return run


def rows(result: dict[str, Any]) -> list[tuple[str, int, str, float]]:
    return [(r["op"], r["B"], r["wgmma"], r["seconds"]["llmexport"]) for r in result["rows"]]


def test_a_run_that_is_cut_off_keeps_its_rows(bench: Bench) -> None:
    assert rows(bench(until=2)) == [("Rope", 0, FASTER, 1.0), ("Rope", 1, FASTER, 1.0)]
    assert rows(bench(until=0)) == [("Rope", 0, FASTER, 1.0), ("Rope", 1, FASTER, 1.0)]


def test_runs_of_one_op_each_add_up(bench: Bench, tmp_path: Path) -> None:
    out = str(tmp_path / "deep" / "out.json")
    bench("--only", "MoeRoute", "--out", out)
    bench("--only", "Rope", "--out", out)
    last = bench("--only", "MoeRoute", "--out", out, seconds=2.0)
    assert rows(last) == [("Rope", b, FASTER, 1.0) for b in (0, 1)] + [("MoeRoute", b, FASTER, 2.0) for b in (2, 3)]
    assert not (tmp_path / "results").exists()


def test_a_run_without_wgmma_stands_beside_the_one_with_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench("--only", "Rope")
    wanted = [("Rope", b, FASTER, 1.0) for b in (0, 1)]
    for said, use, seconds in (("1", "always", 0.5), ("0", "never", 0.25), ("cluster", "in clusters", 0.125)):
        monkeypatch.setenv("LLMEXPORT_SM90A", said)
        found = bench("--only", "Rope", seconds=seconds)
        wanted += [("Rope", b, use, seconds) for b in (0, 1)]
        assert (rows(found), found["wgmma"]) == (wanted, use)
    monkeypatch.delenv("LLMEXPORT_SM90A")
    assert rows(bench("--only", "Rope", seconds=0.75))[-2:] == [("Rope", b, FASTER, 0.75) for b in (0, 1)]


def test_rows_of_other_kernels_or_commits_go(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench("--only", "Rope")
    assert {r["op"] for r in bench("--only", "MoeRoute", kernels="others")["rows"]} == {"MoeRoute"}
    monkeypatch.setenv("LLMEXPORT_COMMIT", "abc")
    result = bench("--only", "Rope", kernels="others")
    assert ({r["op"] for r in result["rows"]}, result["commit"]) == ({"Rope"}, "abc")
    assert all(r["date"] == result["date"] for r in result["rows"])


def test_commit_of_a_tree_that_is_no_checkout(tmp_path: Path) -> None:
    """Nor is it that of a checkout round it."""
    tree = tmp_path / "tests" / "bench"
    tree.mkdir(parents=True)
    for name in ("report.py", "exporters.py"):
        shutil.copy(HERE / name, tree)

    def said(**environment: str) -> str:
        command = [sys.executable, "-c", "import report; print(report.commit())"]
        clean = {k: v for k, v in os.environ.items() if k != "LLMEXPORT_COMMIT"}
        done = subprocess.run(command, cwd=tree, env={**clean, **environment}, capture_output=True, text=True)
        return done.stdout.strip() + done.stderr

    assert said() == "unknown"
    assert said(LLMEXPORT_COMMIT="af44578") == "af44578"
    assert said(PATH="") == "unknown"
    if git := shutil.which("git"):
        for some in (
            ["init", "-q"],
            ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x", "--allow-empty"],
        ):
            subprocess.run([git, *some], cwd=tmp_path, check=True)
        assert said() == "unknown"
        subprocess.run([git, "add", "."], cwd=tmp_path, check=True)
        subprocess.run(
            [git, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "y"], cwd=tmp_path, check=True
        )
        head = subprocess.run([git, "rev-parse", "HEAD"], cwd=tmp_path, check=True, capture_output=True, text=True)
        assert said() == head.stdout.strip()
