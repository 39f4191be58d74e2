"""A golden pack is what an export is fed and must give: it is replayed on ONNX Runtime, and finds what is wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from arch_cases import FIRST_EVERY_TIME, Case, in_each_dtype, others_slow
from misuse import call

from llmexport.export import graph_file, manifest
from llmexport.export.exported import Export
from llmexport.validate import golden, pack, replay
from llmexport.validate.compare import Mismatch, compare
from llmexport.validate.pack import Arrays
from llmexport.validate.replay import Replay
from llmexport.validate.report import Rung
from llmexport.validate.runners import onnx_runner
from llmexport.validate.tolerance import TOLERANCE

pytestmark = pytest.mark.model

PACKED = in_each_dtype(FIRST_EVERY_TIME, ("float32", "float16"))
Change = Callable[[str, Arrays], None]


def make(export: Export, path: Path, tokens: int | None = None) -> Path:
    golden.make(export, path, tokens=tokens, seed=0, force=False)
    return path


@contextlib.contextmanager
def onnx_runtime(export: Export) -> Iterator[replay.Run]:
    with contextlib.ExitStack() as stack:
        runners = {
            g.name: stack.enter_context(onnx_runner(graph_file.load(export, g), export.folder)) for g in export.graphs
        }
        yield lambda graph, feed: {n: np.copy(a) for n, a in runners[graph].infer(feed, check_inputs=False).items()}


def replayed(export: Export, path: Path, change: Change = lambda graph, outputs: None) -> Replay:
    """The pack on ONNX Runtime, whose outputs are changed."""
    with pack.read(path) as opened, onnx_runtime(export) as run:
        replay.check_same(opened, golden.graphs(export), "the export")

        def changed(graph: str, feed: Arrays) -> Arrays:
            outputs = run(graph, feed)
            change(graph, outputs)
            return outputs

        return replay.replay(opened, "ONNX Runtime / golden pack", changed)


@pytest.mark.parametrize(
    ("case", "dtype"),
    others_slow(PACKED, [(c, d) for c, d in PACKED if c.arch == "gemma" or (c.arch, d) == ("bert", "float32")]),
    ids=str,
)
def test_onnx_runtime_gives_what_the_pack_says(case: Case, dtype: str, exported, tmp_path: Path) -> None:
    export = manifest.read(exported(case, dtype))
    path = make(export, tmp_path / "pack.npz")
    found = replayed(export, path)
    assert (found.rung.status, found.rung.note) == ("pass", "")
    with pack.read(path) as opened:
        names = [s.name for s in opened.header.stages]
    assert len(found.rung.details) >= len(names)
    assert found.rung.metrics is not None
    # An encoder chooses no tokens.
    assert (found.rung.metrics.parted is None) == (case.arch == "bert")
    assert {d["step"] for d in found.rung.details} == set(names)


@pytest.fixture(scope="module")
def far(exported, tmp_path_factory: pytest.TempPathFactory) -> tuple[Export, Path]:
    """An export whose config hints at thresholds beyond the prompt, and its pack."""
    export = manifest.read(exported("llama"))
    export = dataclasses.replace(export, text_config={**export.text_config, "window_size": 200, "chunk": 2000})
    return export, make(export, tmp_path_factory.mktemp("far") / "pack.npz", tokens=9)


def test_a_pack_crosses_thresholds_after_a_past_that_it_brings(far: tuple[Export, Path]) -> None:
    export, path = far
    with pack.read(path) as opened:
        stages = {s.name: s for s in opened.header.stages}
        assert {"across 200", "across 2000"} < stages.keys()
        assert opened.header.left_out == ()
    assert replayed(export, path).rung.status == "pass"


def test_crossings_whose_pasts_are_too_large_are_left_out_and_named(far, tmp_path: Path, monkeypatch) -> None:
    export, path = far
    monkeypatch.setattr(golden, "MOST_PASTS", path.stat().st_size // 4)
    less = make(export, tmp_path / "less.npz", tokens=9)
    found = replayed(export, less)
    assert less.stat().st_size < path.stat().st_size / 2
    assert (found.rung.status, found.rung.note) == ("pass", "left out of the pack: across 2000")


def test_a_step_that_loses_its_cache_is_found_where_it_is_read(far: tuple[Export, Path]) -> None:
    calls = iter(range(100))

    def lose(graph: str, outputs: Arrays) -> None:
        if next(calls) == 3:
            key = next(n for n in outputs if n != "logits")
            outputs[key][:] = 0

    rung = replayed(*far, lose).rung
    wrong = {d["step"] for d in rung.details if d["difference"].excess(d["allowed"]) > 1}
    assert wrong == {"decode 4", "decode 5", "decode 6", "decode 7", "decode 8", "last"}


def test_the_pack_of_another_export_is_refused(far: tuple[Export, Path]) -> None:
    export, path = far
    [graph] = export.graphs
    other = dataclasses.replace(export, graphs=(dataclasses.replace(graph, sha256="0" * 64),))
    with pack.read(path) as opened, pytest.raises(Mismatch, match="is of another model than the export"):
        replay.check_same(opened, golden.graphs(other), "the export")


def test_a_reference_that_is_not_what_transformers_is_makes_no_pack(exported, tmp_path: Path, monkeypatch) -> None:
    rung = Rung("PyTorch / transformers", "fail")
    monkeypatch.setattr(golden.Whole, "rungs", lambda self, name: [rung])
    with pytest.raises(Mismatch, match="PyTorch / transformers fails, so nothing can be measured by our PyTorch"):
        make(manifest.read(exported("llama")), tmp_path / "pack.npz", tokens=9)
    assert list(tmp_path.iterdir()) == []


def test_one_block_has_no_pack(exported, tmp_path: Path) -> None:
    with pytest.raises(Mismatch, match="is one block: a golden pack is of a whole model"):
        make(manifest.read(exported("llama", block="mlp")), tmp_path / "pack.npz")


@pytest.mark.parametrize("command", [("golden", "-o", "pack.npz"), ("validate", "--rungs", "transformers"), ("bench",)])
def test_an_export_whose_graph_is_altered_is_refused_before_the_work(
    command: tuple[str, ...], exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(exported("llama"), tmp_path / "export"))
    monkeypatch.chdir(tmp_path)
    (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes() + b"\0")
    ended = call((command[0], "export", *command[1:]))
    assert (ended.code, ended.out) == (2, "")
    assert (
        ended.err == "error: export/model.onnx is not the file that was exported, it has changed since: export again\n"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def test_the_command_writes_a_pack_and_validates_with_it(exported, tmp_path: Path) -> None:
    folder, path = exported("llama"), tmp_path / "pack.npz"
    made = call(("golden", str(folder), "-o", str(path), "--tokens", "9", "--json", "-q"))
    assert made.code == 0, made.err
    said = json.loads(made.out)
    assert (said["bytes"], said["dtype"], said["stages"][0]) == (path.stat().st_size, "float32", "prompt")
    assert said["reference"].startswith("PyTorch in float32, compared with transformers ")
    before = path.read_bytes()
    again = call(("golden", str(folder), "-o", str(path), "-q"))
    assert (again.code, "exists: choose another name" in again.err) == (2, True)
    assert path.read_bytes() == before
    report = call(("validate", str(folder), "--golden", str(path), "--json", "-q"))
    assert (report.code, json.loads(report.out)["rungs"][0]["status"]) == (0, "pass")


def test_the_outputs_of_every_runner_are_saved_for_polygraphy(exported, tmp_path: Path) -> None:
    """What is saved is read by Polygraphy's own loader, and is what was compared."""
    from polygraphy.comparator import RunResults

    folder, saved = Path(shutil.copytree(exported("llama"), tmp_path / "export")), tmp_path / "results.json"
    chosen = ("--rungs", "transformers,onnxruntime", "--tokens", "9")
    ended = call(("validate", str(folder), "--save-results", str(saved), *chosen, "-q"))
    assert ended.code == 0, ended.err
    runs = RunResults.load(str(saved))
    assert list(runs.keys()) == ["transformers", "PyTorch", "ONNX Runtime"]
    assert len({len(stages) for stages in runs.values()}) == 1
    shapes = {name: stages[0]["logits"].shape for name, stages in runs.items()}
    assert set(shapes.values()) == {(2, 9, runs["PyTorch"][0]["logits"].shape[-1])}
    difference = compare(runs["PyTorch"][0]["logits"], runs["ONNX Runtime"][0]["logits"])
    assert 0 < difference.excess(TOLERANCE["float32"]) <= 1


def test_what_is_no_earlier_result_is_not_replaced(exported, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text("{}")
    ended = call(("validate", str(exported("llama")), "--save-results", str(tmp_path / "mine.json"), "-q"))
    assert (ended.code, "is no earlier output" in ended.err) == (2, True)
    assert (tmp_path / "mine.json").read_text() == "{}"
