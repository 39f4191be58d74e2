"""A number that is not finite is laid to the step that made it first."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rungs import EVERYWHERE
from safetensors.numpy import load_file, save_file

from llmexport.export import archs, manifest, onnx_file
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.cli.main import main
from llmexport.export.cli.validate import summary
from llmexport.export.spec import Assembly, Mask, Norm, RelativeBias, Step
from llmexport.validate import ladder, overflow
from llmexport.validate import page as files
from llmexport.validate.compare import compare
from llmexport.validate.report import Report, Rung

pytestmark = [pytest.mark.model, pytest.mark.usefixtures("up_to_onnx_runtime")]

# The blocks do not matter here, only which values the steps read and make.
CHAIN = Assembly((), tuple(Step(f"layers.{i}", Mask(), (f"v{i}",), (f"v{i + 1}",), "") for i in range(3)), ())
INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("made", "step"),
    [
        ((1.0, 2.0, INF, NAN), "layers.1"),
        ((1.0, NAN, NAN, NAN), "layers.0"),
        ((1.0, 2.0, 3.0, -INF), "layers.2"),
        ((1.0, 2.0, 3.0, 65504.0), None),
        ((NAN, NAN, NAN, NAN), None),
    ],
    ids=["infinity in the middle", "NaN from finite numbers", "at the end", "all finite", "given, not made"],
)
def test_the_first_step_that_makes_what_is_not_finite(made: tuple[float, ...], step: str | None) -> None:
    values = {f"v{i}": np.array([0.0, number], np.float16) for i, number in enumerate(made)}
    assert overflow.first_step(CHAIN, values) == step


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_note_names_the_step_and_keeps_what_was_noted(dtype: str) -> None:
    right, wrong = (compare(np.ones(2), np.array([1.0, found])) for found in (1.0, INF))
    rungs = [Rung("a", "pass", "", right), Rung("b", "fail", "first", wrong), Rung("c", "not run", "why")]
    overflow.explain(rungs, dtype, "layers.7")
    said = {"float16": "overflows float16 in layers.7, use bfloat16"}
    expected = said.get(dtype, "layers.7 gives numbers that are not finite")
    assert [r.note for r in rungs] == ["", f"first; {expected}", "why"]


def test_the_largest_magnitude_of_each_step_is_of_what_it_makes() -> None:
    blocks = (Norm(2, 1e-6), Norm(2, 1e-6), Mask(), Norm(2, 1e-6), RelativeBias(2, 8, 20))
    chain = Assembly((), tuple(Step(f"s{i}", b, (f"v{i}",), (f"v{i + 1}",), "") for i, b in enumerate(blocks)), ())
    made = ([9, 9], [-3, 2], [0, NAN], [65504, -65504], [1, -INF], [-65504, 2])
    values = {f"v{i}": np.array(numbers, np.float16) for i, numbers in enumerate(made)}
    # A mask is as large as can be, and no worry, nor is a bias that hides keys.
    assert overflow.largest(chain, values) == {"s0": 3.0, "s1": INF, "s3": INF}
    assert overflow.largest(chain, {}) == {}


@pytest.mark.parametrize(
    ("largest", "said"),
    [
        ({"a": 32752.0, "b": 3.0}, ""),
        ({"a": 3.0, "b": 32768.0, "c": INF}, "b makes 32768, over half of the 65504 that float16 holds: other input"),
        ({"a": 3.0, "b": INF, "c": INF}, "b overflows float16: use bfloat16"),
        ({}, ""),
    ],
)
def test_the_first_step_over_half_of_float16_is_warned_of(largest: dict[str, float], said: str) -> None:
    assert overflow.near(largest).startswith(said)
    assert bool(overflow.near(largest)) == bool(said)


def test_what_only_the_exported_file_overflows_is_found_block_by_block() -> None:
    found = [1.0, INF, NAN]
    details = [{"step": f"layers.{i}", "difference": compare(np.ones(1), np.array([n]))} for i, n in enumerate(found)]
    assert overflow.first_alone(Rung("blocks", "fail", details=details)) == "layers.1"
    assert overflow.first_alone(Rung("blocks", "pass", details=details[:1])) is None


@pytest.fixture(scope="module")
def climbed(tiny_checkpoint, tmp_path_factory) -> Callable[[str], tuple[manifest.Manifest, Report]]:
    """Climbs with a Gemma 3 whose layer 1 makes numbers past 65504 between its MLP and the norm behind it."""
    base = tmp_path_factory.mktemp("overflow")
    shutil.copytree(tiny_checkpoint("gemma3_text"), base / "ck")
    weight_map = json.loads((base / "ck/model.safetensors.index.json").read_text())["weight_map"]
    for part, factor in (("gate_proj", 20), ("up_proj", 20), ("down_proj", 1e5)):
        name = f"model.layers.1.mlp.{part}.weight"
        tensors = load_file(base / "ck" / weight_map[name])
        tensors[name] *= np.float32(factor)
        # The weight itself fits.
        assert np.abs(tensors[name]).max() < 65504
        save_file(tensors, base / "ck" / weight_map[name], {"format": "pt"})

    def climb(dtype: str) -> tuple[manifest.Manifest, Report]:
        checkpoint = open_checkpoint(base / "ck")
        request = onnx_file.Request(archs.choose(None, checkpoint.config), checkpoint, dtype)
        onnx_file.write(request, base / dtype, force=False)
        found = manifest.read(base / dtype)
        return found, ladder.climb(found, rungs=EVERYWHERE)

    return climb


def test_float16_that_overflows_is_said_to_in_every_form_of_the_report(climbed) -> None:
    found, report = climbed("float16")
    note = "overflows float16 in layers.1, use bfloat16"
    rungs = {r.name: (r.status, r.note) for r in report.rungs}
    assert rungs == {
        "PyTorch / transformers": ("fail", note),
        "PyTorch / transformers, float32": ("pass", ""),
        "blocks: ONNX Runtime / PyTorch": ("fail", note),
        # On a CPU it computes in fp32 from layer to layer, and agrees with PyTorch in fp32.
        "ONNX Runtime / PyTorch": ("pass", ""),
    }
    assert not report.passed
    assert report.warning == "layers.1 overflows float16: use bfloat16"
    assert list(report.largest) == [s.name for s in found.steps if s.name in report.largest]
    assert {"embedding", "layers.0", "layers.1", "head"} <= report.largest.keys()
    assert report.largest["layers.0"] < report.largest["layers.1"] == INF
    files.write(found, report)
    assert (found.folder / "report.html").read_text().count(note) == 2
    assert [r["note"] for r in json.loads((found.folder / "report.json").read_text())["rungs"]].count(note) == 2
    assert sum(said.endswith(note) for _, said in summary(report)) == 2


def test_the_same_model_in_float32_passes(climbed) -> None:
    report = climbed("float32")[1]
    assert {(r.status, r.note) for r in report.rungs} == {("pass", "")}
    assert (report.largest, report.warning) == ({}, "")


@pytest.mark.parametrize(
    ("arch", "dtype", "times"), [("gemma3_text", "float16", 1), ("gemma3_text", "float32", 0), ("llama", "float16", 0)]
)
def test_an_export_is_warned_of_what_is_known(arch: str, dtype: str, times: int, tmp_path, monkeypatch, capsys) -> None:
    command = ["llmexport", "onnx", "--arch", arch, "--dtype", dtype, "-o", str(tmp_path / "out"), "--json"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    note = "published Gemma 3 checkpoints overflow float16 and give nan, use bfloat16 or float32"
    assert ended.value.code in (0, None)
    assert err.count(f"note: {note}\n") == times
    assert json.loads(out)["notes"] == [note] * times == list(manifest.read(tmp_path / "out").notes)


def test_a_weight_that_is_nan_is_no_overflow(tiny_checkpoint, tmp_path) -> None:
    source = Path(shutil.copytree(tiny_checkpoint("gemma"), tmp_path / "ck"))
    name = "model.layers.1.mlp.down_proj.weight"
    shard = source / json.loads((source / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(shard)
    tensors[name][0, 0] = np.nan
    save_file(tensors, shard, {"format": "pt"})
    checkpoint = open_checkpoint(source)
    request = onnx_file.Request(archs.choose(None, checkpoint.config), checkpoint, "float16")
    onnx_file.write(request, tmp_path / "nan", force=False)
    report = ladder.climb(manifest.read(tmp_path / "nan"), rungs=EVERYWHERE)
    assert report.warning == ""
    notes = [r.note for r in report.rungs if r.status == "fail"]
    assert notes
    assert set(notes) == {"layers.1 gives numbers that are not finite"}
