"""`golden`, and `validate --golden`, as a user calls them: where the engine is, too, without torch and without ONNX."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from engine_folder import make_engine
from misuse import call
from toy_pack import make_pack, parts

from llmexport.validate import pack as packs

TESTS = Path(__file__).parent.parent
# What a target need not have. An import of it ends the process.
ABSENT = ["torch", "transformers", "onnx", "onnxruntime", "onnx_graphsurgeon", "onnxscript", "safetensors"]
TARGET = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent}:
            raise ImportError(f"{{name}} is not on the target")

sys.meta_path.insert(0, Absent())
from llmexport.export import device
from llmexport.validate import engine
gpu, child = {gpu!r}, {child!r}
device.first = lambda: device.Device("H200", (9, 0)) if gpu else "no GPU is found here, libcuda.so.1 is not installed"
if child:
    engine.COMMAND = (sys.executable, child, "float16", "")
from llmexport.export.cli.main import main
main()
"""


def on_target(*arguments: str, gpu: bool = True) -> subprocess.CompletedProcess[str]:
    """The command where neither torch nor ONNX is, with a stand-in in place of TensorRT."""
    code = TARGET.format(absent=[*ABSENT, "ml_dtypes"], gpu=gpu, child=str(TESTS / "engine_child.py"))
    # The stand-in runs in another process, and needs what tests need.
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return make_engine(tmp_path / "engine")


def test_an_engine_is_validated_where_neither_torch_nor_onnx_is(engine: Path, tmp_path: Path) -> None:
    pack = make_pack(tmp_path / "pack.npz")
    before = {p.name: p.read_bytes() for p in engine.iterdir()}
    ended = on_target("validate", "--engine", str(engine), "--golden", str(pack), "--json")
    assert (ended.returncode, ended.stderr) == (0, "check the engine (1/2)\nengine (2/2)\n")
    report = json.loads(ended.stdout)
    [rung] = report["rungs"]
    assert (rung["name"], rung["key"], rung["status"]) == ("engine / golden pack", "engine", "pass")
    assert rung["metrics"]["top1"] == 1
    assert report["passed"]
    assert {p.name: p.read_bytes() for p in engine.iterdir()} == before


def test_numbers_that_are_wrong_are_exit_code_1(engine: Path, tmp_path: Path) -> None:

    header, arrays = parts()
    arrays["expected/2/logits"] = arrays["expected/2/logits"] + np.float16(0.5)
    packs.write(tmp_path / "pack.npz", header, arrays, force=False)
    ended = on_target("validate", "--engine", str(engine), "--golden", str(tmp_path / "pack.npz"))
    assert ended.returncode == 1
    assert "fail" in ended.stdout
    assert "not proven" in ended.stdout


def test_without_a_gpu_one_line_says_so_and_nothing_claims_to_have_run(engine: Path, tmp_path: Path) -> None:
    pack = make_pack(tmp_path / "pack.npz")
    ended = on_target("validate", "--engine", str(engine), "--golden", str(pack), "-q", gpu=False)
    said = "error: no GPU is found here, libcuda.so.1 is not installed: run this where the engine is to run\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", said)


def other_model(engine: Path, pack: Path) -> None:
    pack.unlink()
    make_pack(pack, digest="c" * 64)


def other_format(engine: Path, pack: Path) -> None:
    with np.load(pack) as npz:
        arrays = dict(npz)
    text = arrays.pop("header").tobytes().replace(b'"format": 1', b'"format": 7')
    np.savez(pack, header=np.frombuffer(text, np.uint8), **arrays)


def truncated(engine: Path, pack: Path) -> None:
    os.truncate(pack, pack.stat().st_size - 100)


def other_names(engine: Path, pack: Path) -> None:
    pack.unlink()
    make_pack(pack, "float32")


def other_plan(engine: Path, pack: Path) -> None:
    (engine / "model.plan").write_bytes(b"z" * 1000)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (other_model, "is of another model than the engine in"),
        (other_format, "is of format 7, this version reads 1"),
        (truncated, "is no golden pack, damaged or of another version"),
        (other_names, "have other ports, as past float"),
        (other_plan, "is not the plan that engine.json describes: build it again"),
    ],
)
def test_what_does_not_belong_together_is_refused_in_one_line(engine: Path, tmp_path: Path, change, says: str) -> None:
    pack = make_pack(tmp_path / "pack.npz")
    change(engine, pack)
    ended = call(("validate", "--engine", str(engine), "--golden", str(pack), "-q"))
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
    assert ended.err.startswith("error: ")
    assert says in ended.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give one of FOLDER and --engine"),
        (["out", "--engine", "e", "--golden", "p"], "give one of FOLDER and --engine"),
        (["--engine", "e"], "--engine needs --golden, a pack of `llmexport golden`: see `llmexport validate --help`"),
        (["out", "--golden", "p", "--tokens", "9"], "--golden brings its own prompt and rung: leave out --tokens"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments: list[str], says: str) -> None:
    ended = call(("validate", *arguments))
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert says in ended.err


def test_results_of_an_engine_are_read_by_polygraphy_itself(engine: Path, tmp_path: Path) -> None:
    """Its command line inspects them, and compares them with themselves and with others."""
    pack, saved = make_pack(tmp_path / "pack.npz"), tmp_path / "results.json"
    ended = on_target("validate", "--engine", str(engine), "--golden", str(pack), "--save-results", str(saved), "-q")
    assert (ended.returncode, ended.stderr) == (0, "")
    seen = polygraphy("inspect", "data", str(saved))
    assert "engine" in seen
    assert "golden pack" in seen
    assert "5 iterations" in seen
    assert "logits [dtype=float16, shape=(2, 7, 31)]" in seen
    assert "PASSED" in polygraphy("run", "--load-outputs", str(saved), "--validate")


def polygraphy(*arguments: str) -> str:
    code = "import sys; from polygraphy.tools import main; sys.exit(main())"
    ended = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout
