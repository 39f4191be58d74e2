"""The package as a library: the lines that README shows, and what stands in for the checks of the command line."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from llmexport.export import build_engine, export, manifest, random_checkpoint
from llmexport.export.archs import load
from llmexport.export.errors import EngineError, ExportError
from llmexport.validate import validate

pytestmark = pytest.mark.model

README = Path(__file__).parents[2] / "README.md"
[LINES] = re.findall(r"```python\n(from llmexport.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.slow
def test_the_lines_of_the_readme_run(tmp_path: Path) -> None:
    """In a process of their own, beside a checkpoint of the name that they say."""
    [name] = re.findall(r'export\("(.+?)"', LINES)
    random_checkpoint.write(load("qwen3"), tmp_path / name)
    subprocess.run([sys.executable, "-c", LINES], cwd=tmp_path, check=True)
    [made] = tmp_path.glob("*/manifest.json")
    files = {p.name for p in made.parent.iterdir()}
    assert files >= {"model.onnx", "model.plan", "engine.json", "report.json"}


def test_an_export_is_what_is_read_back_from_its_folder(tmp_path: Path) -> None:
    made = export(None, tmp_path / "out", arch="llama", block="mlp", dtype="float16")
    assert made == manifest.read(tmp_path / "out")
    assert (made.folder, made.arch, made.block, made.dtype) == (tmp_path / "out", "llama", "mlp", "float16")


@pytest.mark.parametrize(("name", "value"), [("dtype", "fp16"), ("weights", "symlink"), ("target", "trt")])
def test_an_argument_that_is_none_of_the_choices_is_refused(name: str, value: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=f"^{name} is '{value}': choose one of"):
        export(None, tmp_path / "out", arch="llama", **{name: value})
    assert not list(tmp_path.iterdir())


def test_a_backend_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"^backend is 'onnxruntime': choose one of tensorrt-rtx, tensorrt"):
        build_engine(tmp_path, backend="onnxruntime")


def test_weights_that_are_neither_inside_a_plan_nor_beside_it_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"^weights is 'above': choose one of inside, beside$"):
        build_engine(tmp_path, weights="above")


@pytest.mark.parametrize("seconds", [0.5, -1.0, 1e12, float("nan")])
def test_a_timeout_that_no_timer_takes_is_refused(seconds: float, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"^timeout is .*: make it 1 to 100000000 seconds"):
        build_engine(tmp_path, timeout=seconds)


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_a_path_that_names_nothing_is_refused(path: str) -> None:
    for call in (lambda: export(None, path, arch="llama"), lambda: build_engine(path), lambda: validate(path)):
        with pytest.raises(ExportError, match="names no folder: give one"):
            call()


def test_importing_the_package_imports_nothing_that_takes_long() -> None:
    code = (
        "import sys, llmexport.export, llmexport.validate; assert not {'torch', 'onnx', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
