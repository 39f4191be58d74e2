"""`llmexport bench`: numbers first, then times."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import browser
import pytest
from arch_cases import CASES

from llmexport.export import archs, onnx_file
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.cli.main import main
from llmexport.run import bench as module
from llmexport.run.bench import Bench, Row, bench
from llmexport.run.bench_page import page
from llmexport.run.bench_run import Job, Timing
from llmexport.run.errors import RunError

pytestmark = pytest.mark.model
TIMING = Timing("it 1.0", [[1, 2, 3], [4, 5, 6]], 1.0, [0.2, 0.1, 0.9], [0.04, 0.01, 0.02], 7_000_000)
JOB = Job("nowhere", "onnxruntime", [[1]], 2, 1, 1)


def test_a_row_is_medians_and_counts_each_prompt_of_a_batch() -> None:
    row = module._row("onnxruntime", TIMING, TIMING)
    assert row == Row("ONNX Runtime", "it 1.0", True, 1.0, 0.2, 0.02, 2 / 0.02, 7_000_000)


def test_a_runner_with_other_tokens_gets_no_time() -> None:
    other = dataclasses.replace(TIMING, tokens=[[1, 2, 3], [4, 9, 6]])
    row = module._row("onnxruntime", TIMING, other)
    assert row == Row("ONNX Runtime", "not timed: token 2 is not PyTorch's", right=False)


def test_a_runner_that_nobody_can_be_held_against_gets_no_time() -> None:
    assert module._row("onnxruntime", TIMING, "it died").first is None


def test_what_cannot_run_says_why_and_is_no_failure() -> None:
    assert module._row("engine", "no GPU", TIMING) == Row("engine", "not run: no GPU")


def test_a_process_that_dies_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    dies = (sys.executable, "-c", "import os, sys; sys.stdin.read(); os.kill(os.getpid(), 9)")
    monkeypatch.setattr(module, "COMMAND", dies)
    assert module._child(JOB) == "its process ended with SIGKILL: "
    monkeypatch.setattr(module, "COMMAND", (sys.executable, "-c", "import sys; sys.stdin.read(); sys.exit('why')"))
    assert module._child(JOB) == "its process ended with exit code 1: why"


def test_a_users_mistake_in_the_process_is_a_reason() -> None:
    said = module._child(JOB)
    assert isinstance(said, str)
    assert "nowhere is no export" in said


def measured(*rows: Row) -> Bench:
    return Bench("<arch>", "float32", 1, 8, 4, 1, 1, rows, {"processor": "a <CPU>"})


def test_the_page_shows_what_was_timed_and_asks_for_nothing() -> None:
    timed = module._row("onnxruntime", TIMING, TIMING)
    text = page(measured(timed, Row("engine", "not run: <no GPU>")).as_data())
    assert text.count("<rect") == 3
    assert "not run: &lt;no GPU&gt;" in text
    assert "<arch>" not in text
    assert re.findall(r"(?:src|href)=(?!\"data:)|https?:|url\(", text) == []


def test_no_bar_lies_over_a_name_on_a_narrow_screen(tmp_path: Path) -> None:
    if (program := browser.find()) is None:
        pytest.skip(f"needs a browser: none of {', '.join(browser.NAMES)} is installed")
    timed = [module._row(runner, TIMING, TIMING) for runner in module.RUNNERS]
    (tmp_path / "bench.html").write_text(page(measured(*timed).as_data()), encoding="utf-8")
    with browser.chromium(program, tmp_path) as tab:
        shown = tab.open(tmp_path / "bench.html", width=360, scheme="light")
        assert shown.says("document.querySelectorAll('rect').length") == 9
        assert shown.says("document.documentElement.scrollWidth <= window.innerWidth")
        assert shown.says(UNDER) == []


# The texts that a bar of their own line lies over.
UNDER = """
[...document.querySelectorAll("rect")].flatMap(r => {
  const bar = r.getBoundingClientRect(), name = r.previousElementSibling, value = r.nextElementSibling;
  return [name, value].filter(t => t.getBoundingClientRect().left < bar.right
    && t.getBoundingClientRect().right > bar.left).map(t => t.textContent) })
"""


def test_the_page_of_nothing_timed_has_no_plot() -> None:
    assert "<svg" not in page(measured(Row("engine", "not run: no GPU")).as_data())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens is too small: make it 1 or more"),
        ({"new_tokens": 1}, "new_tokens is too small: make it 2 or more"),
        ({"prompt_tokens": 500}, r"500 \+ 64 tokens are asked for, the model takes 512: ask for fewer"),
    ],
)
def test_what_cannot_be_measured_is_one_line(arguments: dict[str, int], says: str, exported) -> None:
    with pytest.raises(RunError, match=says):
        bench(exported("llama"), **arguments)


def test_runners_are_timed_and_the_result_lies_beside_the_export(
    exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(exported("llama"), tmp_path / "export"))
    said = ["--prompt-tokens", "9", "--new-tokens", "5", "--batch", "2", "--runs", "2", "--threads", "1", "--json"]
    monkeypatch.setattr(sys, "argv", ["llmexport", "bench", str(folder), *said])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((folder / "bench.json").read_text())
    assert "<svg" in (folder / "bench.html").read_text()
    rows = {row["runner"]: row for row in found["rows"]}
    assert rows["engine"]["note"].startswith("not run: ")
    for runner in ("ONNX Runtime", "PyTorch, eager"):
        row = rows[runner]
        assert row["tokens_per_second"] == pytest.approx(2 / row["step"])
        assert row["step"] > 0
        assert row["first"] > 0
        assert row["peak"] > 10_000_000


@pytest.mark.parametrize("exact", [TIMING, dataclasses.replace(TIMING, tokens=[[1, 2, 3], [4, 8, 6]]), "it died"])
def test_tokens_that_rounding_to_8_bits_changes_are_timed(exact, exported, monkeypatch: pytest.MonkeyPatch) -> None:
    rounded = dataclasses.replace(TIMING, tokens=[[1, 2, 3], [4, 9, 6]])
    jobs: list[Job] = []

    def child(job: Job) -> Timing | str:
        jobs.append(job)
        return {"eager": TIMING, "engine": "no GPU"}.get(job.runner, rounded if job.fused else exact)

    monkeypatch.setattr(module, "_child", child)
    row = bench(exported("llama")).rows[0]
    assert [(j.runner, j.runs) for j in jobs if not j.fused] == [("onnxruntime", 0)]
    if exact != TIMING:
        assert (row.note, row.right, row.step) == ("not timed: token 2 is not PyTorch's", False, None)
        return
    assert row.note.startswith("it 1.0: token 2 is not PyTorch's, as what packed numbers are multiplied with")
    assert (row.right, row.step, row.first) == (True, 0.02, 0.2)


@pytest.mark.slow
def test_an_export_in_8_bits_is_timed(tiny_checkpoint, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint(CASES[2]))
    onnx_file.write(onnx_file.Request(archs.load("llama"), checkpoint, quantize="int8"), tmp_path / "export")
    ours = bench(tmp_path / "export", runs=1).rows[0]
    assert (ours.runner, ours.right) == ("ONNX Runtime", True), ours.note
    assert ours.step


def test_other_tokens_end_with_exit_code_1(exported, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = dataclasses.replace(TIMING, tokens=[[1, 2, 4], [4, 5, 6]])
    monkeypatch.setattr(module, "_child", lambda job: TIMING if job.runner == "eager" else other)
    monkeypatch.setattr(sys, "argv", ["llmexport", "bench", str(exported("llama")), "-o", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert "token 3 is not PyTorch" in (tmp_path / "bench.html").read_text()
