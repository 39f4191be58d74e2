"""Weights: each parameter bound once to the tensor where it lies, and no tensor passed over."""

import re
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from onnx import TensorProto
from safetensors.numpy import save_file

from llmexport.export import weights
from llmexport.export.checkpoint import Checkpoint, StoredTensor, open_checkpoint
from llmexport.export.errors import ExportError
from llmexport.export.weights import Parameter

SHAPE = (3, 5)


def stored(*tensors: StoredTensor) -> Checkpoint:
    return Checkpoint(Path("checkpoint"), {}, {t.name: t for t in tensors}, ())


def tensor(name: str, shape: tuple[int, ...] = SHAPE, dtype: str = "F32") -> StoredTensor:
    return StoredTensor(name, dtype, shape, "model.safetensors", 64, 60)


def wanted(*names: str) -> dict[str, Parameter]:
    return {n: Parameter(n, SHAPE) for n in names}


def refusal(want: dict[str, Parameter], have: Checkpoint, ignore: tuple[str, ...] = (), whole: bool = True) -> str:
    """The one line that says why a checkpoint does not fit."""
    with pytest.raises(ExportError) as error:
        weights.check(want, have, ignore, whole)
    line = str(error.value)
    assert len(line.splitlines()) == 1
    return line


def test_accepts_a_checkpoint_that_fits():
    weights.check(wanted("a", "b"), stored(tensor("b"), tensor("a")), (), whole=True)


def test_names_a_missing_tensor():
    line = refusal(wanted("a", "b"), stored(tensor("a")))
    assert line.startswith("checkpoint lacks 1 tensors that its config.json asks for: b. ")


def test_lists_the_first_ten_missing_tensors():
    names = [f"layer.{i}" for i in range(13)]
    line = refusal(wanted(*names), stored(tensor("other")))
    assert "lacks 13 tensors" in line
    assert ": " + ", ".join(names[:10]) + " and 3 more. " in line


def test_lists_ten_missing_tensors_without_and_more():
    line = refusal(wanted(*(f"layer.{i}" for i in range(10))), stored())
    assert "layer.9. " in line
    assert "more" not in line


def test_names_an_unexpected_tensor():
    line = refusal(wanted("a"), stored(tensor("a"), tensor("a.lora")))
    assert line.startswith("checkpoint holds 1 tensors that this architecture does not use: a.lora. ")


def test_lists_the_first_ten_unexpected_tensors():
    names = [f"extra.{i}" for i in range(12)]
    line = refusal(wanted("a"), stored(tensor("a"), *map(tensor, names)))
    assert ": " + ", ".join(names[:10]) + " and 2 more. " in line


def test_an_unexpected_tensor_that_is_named_in_ignore_may_stay():
    checkpoint = stored(tensor("a"), tensor("layers.7.rotary.inv_freq"))
    weights.check(wanted("a"), checkpoint, ("layers.*.inv_freq",), whole=True)


def test_ignore_does_not_excuse_a_tensor_that_is_wanted():
    assert "lacks 1 tensors" in refusal(wanted("a"), stored(), ("a",))


def test_one_block_alone_may_leave_tensors_over():
    weights.check(wanted("a"), stored(tensor("a"), tensor("b")), (), whole=False)


def test_one_block_alone_still_needs_its_tensors():
    assert "lacks 1 tensors" in refusal(wanted("a"), stored(tensor("b")), whole=False)


@pytest.mark.parametrize("shape", [(5, 3), (15,), (3, 5, 1), ()])
def test_a_wrong_shape_is_named_with_both_shapes(shape):
    line = refusal(wanted("a"), stored(tensor("a", shape)))
    assert line.startswith(f"a is {list(shape)} in the checkpoint, config.json makes it [3, 5]")


@pytest.mark.parametrize("dtype", ["I8", "U8", "F8_E4M3", "I32", "F64", "BOOL"])
def test_a_dtype_that_is_no_weight_is_named(dtype):
    line = refusal(wanted("a"), stored(tensor("a", dtype=dtype)))
    assert line.startswith(f"a is stored as {dtype}; F32, F16, BF16 can be exported. ")


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_float_dtype_is_accepted(dtype):
    weights.check(wanted("a"), stored(tensor("a", dtype=dtype)), (), whole=True)


# Two weights read by three nodes; b is read twice.
GRAPH = """(float[tokens, 3] x, float[3, 5] a, float[3, 5] b) => (float[tokens, 5] y) {
    left = MatMul(x, a)
    right = MatMul(x, b)
    both = Add(left, right)
    z = MatMul(x, b)
    y = Add(both, z)
}"""
NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def bound(tmp_path: Path, dtype: str = "F32") -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """GRAPH with its weights in a checkpoint of this dtype, written beside it; and the weights."""
    random = np.random.default_rng(0)
    values = {n: random.standard_normal(SHAPE).astype(NUMPY[dtype]) for n in ("a", "b")}
    save_file(values, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 23]> g {GRAPH}')
    weights.bind(model, wanted("a", "b"), open_checkpoint(tmp_path), TensorProto.FLOAT)
    return model, values


def test_a_bound_weight_is_no_longer_an_input(tmp_path):
    model, _ = bound(tmp_path)
    assert [i.name for i in model.graph.input] == ["x"]


def test_a_bound_weight_points_to_its_bytes(tmp_path):
    model, values = bound(tmp_path)
    file = (tmp_path / "model.safetensors").read_bytes()
    for initializer in model.graph.initializer:
        where = {e.key: e.value for e in initializer.external_data}
        start, length = int(where["offset"]), int(where["length"])
        assert where["location"] == "model.safetensors"
        assert file[start : start + length] == values[initializer.name].tobytes()


def test_no_weight_is_copied_into_the_model(tmp_path):
    model, _ = bound(tmp_path)
    assert [t.data_location for t in model.graph.initializer] == [TensorProto.EXTERNAL] * 2
    assert not any(t.raw_data or t.float_data for t in model.graph.initializer)


def test_a_weight_of_the_graphs_type_is_read_as_it_is(tmp_path):
    model, _ = bound(tmp_path)
    assert "Cast" not in [n.op_type for n in model.graph.node]


def test_a_weight_of_another_type_is_cast_once(tmp_path):
    model, _ = bound(tmp_path, "BF16")
    casts = [n for n in model.graph.node if n.op_type == "Cast"]
    assert [(list(n.input), list(n.output)) for n in casts] == [(["a"], ["a/cast"]), (["b"], ["b/cast"])]
    assert sum("b/cast" in n.input for n in model.graph.node) == 2


@pytest.mark.parametrize("dtype", NUMPY)
def test_onnx_runtime_computes_with_the_checkpoints_numbers(tmp_path, dtype):
    model, values = bound(tmp_path, dtype)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    # One row at a time of a unit matrix: every product is exact.
    found = session.run(None, {"x": np.eye(3, dtype=np.float32)})[0]
    a, b = (values[n].astype(np.float32) for n in ("a", "b"))
    assert np.array_equal(found, (a + b) + b)


def test_an_error_names_no_more_than_it_must():
    line = refusal(wanted("a"), stored(tensor("a"), *(tensor(f"extra.{i}") for i in range(5000))))
    assert len(re.findall(r"extra\.", line)) == weights.LISTED
