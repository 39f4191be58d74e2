"""A runtime that cannot run an export is named in one line."""

from __future__ import annotations

import onnx
import onnx.parser
import onnxruntime
import pytest

from llmexport.validate.compare import Mismatch
from llmexport.validate.runners import onnx_runner

RELU = '<ir_version: 10, opset_import: ["": 23]> g (float[2] x) => (float[2] y) { y = Relu (x) }'


def refusal(text: str, tmp_path) -> str:
    with pytest.raises(Mismatch) as error:
        onnx_runner(onnx.parser.parse_model(text), tmp_path)
    return str(error.value)


@pytest.mark.parametrize("version", ["1.22.1", "1.23.0", "1.23.1+cuda"])
def test_a_runtime_that_is_too_old_is_named_with_the_oldest_that_is_not(version, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", version)
    line = refusal(RELU, tmp_path)
    assert line.startswith(f"ONNX Runtime {version} is installed")
    assert line.endswith("to 1.23.2 or later")


SCATTER = "TensorScatter <axis = -2> (p, u, i)"
BRANCH = f"""If (c) <then_branch = t () => (float[1, 1, 4, 2] a) {{ a = Identity(p) }},
    else_branch = e () => (float[1, 1, 4, 2] b) {{ b = {SCATTER} }}>"""


GROUP = BRANCH.replace(SCATTER, "com.microsoft.GroupQueryAttention <num_heads = 1, kv_num_heads = 1> (u, u, u, p, p)")


@pytest.mark.parametrize("made", [SCATTER, BRANCH, GROUP], ids=["plain", "in a branch", "in place"])
def test_a_static_cache_takes_a_later_runtime(made, tmp_path, monkeypatch) -> None:
    """1.24.4 does not run it, 1.25.0 does."""
    scatter = f"""<ir_version: 10, opset_import: ["": 24, "com.microsoft": 1]> g
        (float[1, 1, 4, 2] p, float[1, 1, 1, 2] u, int64[1] i, bool c) => (float[1, 1, 4, 2] y) {{ y = {made} }}"""
    monkeypatch.setattr(onnxruntime, "__version__", "1.24.4")
    assert refusal(scatter, tmp_path).endswith("to 1.25 or later")


@pytest.mark.parametrize("version", ["1.23.2", "1.24.0.dev20260101", "2.0"])
def test_later_runtimes_are_taken(version, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", version)
    assert onnx_runner(onnx.parser.parse_model(RELU), tmp_path).name == "ONNX Runtime"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('"": 23', '"": 99'), "till opset"),
        (("Relu", "Reluu"), "Reluu"),
        (("(x)", "(x, x)"), "Relu"),
    ],
)
def test_what_a_runtime_says_against_a_model_is_one_line(change, said, tmp_path) -> None:
    line = refusal(RELU.replace(*change), tmp_path)
    assert line.startswith(f"ONNX Runtime {onnxruntime.__version__} does not take the model: ")
    assert said in line
    assert "\n" not in line
