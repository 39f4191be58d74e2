"""Weights: each parameter bound once to the tensor where it lies, and no tensor passed over."""

import dataclasses
import json
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
from llmexport.export.checkpoint import Checkpoint, open_checkpoint
from llmexport.export.errors import ExportError
from llmexport.export.stored_tensor import StoredTensor
from llmexport.export.weights import Parameter
from llmexport.validate.compare import compare
from llmexport.validate.tolerance import TOLERANCE

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
    assert line.startswith(f"a is stored as {dtype}; F32, F16, BF16 can be exported here. ")


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_float_dtype_is_accepted(dtype):
    weights.check(wanted("a"), stored(tensor("a", dtype=dtype)), (), whole=True)


# Two experts of 4 matrices, stacked as [2, 4, 5].
PARTS = ("e0.gate", "e0.up", "e1.gate", "e1.up")
STACK = Parameter("gate_up", (2, 4, 5), PARTS)


def part(name: str, shape: tuple[int, ...] = (2, 5), dtype: str = "F32") -> StoredTensor:
    return tensor(name, shape, dtype)


def test_a_stack_is_accepted_in_parts():
    weights.check({"gate_up": STACK}, stored(*map(part, PARTS)), (), whole=True)


def test_a_stack_of_one_matrix_an_expert_is_accepted():
    down = Parameter("down", (3, 4, 5), ("e0", "e1", "e2"))
    weights.check({"down": down}, stored(*(part(n, (4, 5)) for n in down.parts)), (), whole=True)


@pytest.mark.parametrize("missing", PARTS)
def test_a_missing_part_is_named(missing):
    line = refusal({"gate_up": STACK}, stored(*(part(n) for n in PARTS if n != missing)))
    assert line.startswith(f"checkpoint lacks 1 tensors that its config.json asks for: {missing}. ")


def test_a_stack_beside_its_parts_is_one_too_many():
    line = refusal({"gate_up": STACK}, stored(*map(part, PARTS), tensor("gate_up", (2, 4, 5))))
    assert line.startswith("checkpoint holds 1 tensors that this architecture does not use: gate_up. ")


def test_a_part_of_an_expert_too_many_is_named():
    line = refusal({"gate_up": STACK}, stored(*map(part, PARTS), part("e2.gate")))
    assert "does not use: e2.gate. " in line


@pytest.mark.parametrize("shape", [(5, 2), (4, 5), (1, 2, 5), (10,)])
def test_a_part_of_a_wrong_shape_is_named_with_both_shapes(shape):
    parts = [part(n, shape if n == "e1.gate" else (2, 5)) for n in PARTS]
    line = refusal({"gate_up": STACK}, stored(*parts))
    assert line.startswith(f"e1.gate is {list(shape)} in the checkpoint, config.json makes it [2, 5]")


def test_a_part_of_a_wrong_type_is_named():
    line = refusal({"gate_up": STACK}, stored(*(part(n, dtype="U8" if n == "e0.up" else "F32") for n in PARTS)))
    assert line.startswith("e0.up is stored as U8; F32, F16, BF16 can be exported here. ")


def test_parts_of_two_types_are_refused_by_the_name_of_their_stack():
    checkpoint = stored(*(part(n, dtype="F16" if n == "e1.up" else "BF16") for n in PARTS))
    with pytest.raises(ExportError, match=r"the parts of gate_up are stored as BF16, F16: convert them to one"):
        weights.stored_type(STACK, checkpoint, TensorProto.FLOAT)


# 4-bit values of 3 experts, 2 rows of 64, as bytes of two and as blocks of 16 bytes.
BLOCKS = Parameter("down_blocks", (3, 2, 32), dtype="uint8", group=16)
SCALES = Parameter("down_scales", (3, 2, 2), dtype="uint8")
PACKED = {p.name: p for p in (BLOCKS, SCALES)}


@pytest.mark.parametrize("shape", [(3, 2, 2, 16), (3, 2, 32)])
def test_packed_values_are_accepted_row_by_row_and_in_blocks(shape):
    checkpoint = stored(tensor("down_blocks", shape, "U8"), tensor("down_scales", (3, 2, 2), "U8"))
    weights.check(PACKED, checkpoint, (), whole=True)


@pytest.mark.parametrize("shape", [(3, 2, 16, 3), (3, 2, 1, 16), (3, 2, 64), (3, 64), (2, 3, 2, 16), (6, 2, 16)])
def test_packed_values_of_another_size_are_refused(shape):
    line = refusal({"down_blocks": BLOCKS}, stored(tensor("down_blocks", shape, "U8")))
    assert line.startswith(f"down_blocks is {list(shape)} in the checkpoint, config.json makes it [3, 2, 32]")


@pytest.mark.parametrize("shape", [(3, 2, 16, 2), (3, 2, 1, 32), (3, 2, 32, 1), (3, 2, 4, 8)])
def test_packed_values_in_other_blocks_are_refused(shape):
    line = refusal({"down_blocks": BLOCKS}, stored(tensor("down_blocks", shape, "U8")))
    assert line.startswith(f"down_blocks is {list(shape)} in the checkpoint")


def test_a_row_that_is_no_whole_number_of_blocks_is_refused_in_blocks():
    ragged = Parameter("down_blocks", (3, 2, 40), dtype="uint8", group=16)
    refusal({"down_blocks": ragged}, stored(tensor("down_blocks", (3, 2, 2, 16), "U8")))


@pytest.mark.parametrize("dtype", ["F32", "BF16", "I8", "F8_E8M0"])
def test_packed_values_that_are_no_bytes_are_refused(dtype):
    line = refusal({"down_blocks": BLOCKS}, stored(tensor("down_blocks", (3, 2, 32), dtype)))
    assert line.startswith(f"down_blocks is stored as {dtype}; U8 can be exported here. ")


@pytest.mark.parametrize(("there", "lacks"), [("down_blocks", "down_scales"), ("down_scales", "down_blocks")])
def test_blocks_and_scales_need_each_other(there, lacks):
    shape = PACKED[there].shape
    line = refusal(PACKED, stored(tensor(there, shape, "U8")))
    assert line.startswith(f"checkpoint lacks 1 tensors that its config.json asks for: {lacks}. ")


def test_values_that_are_stored_unpacked_lack_both_blocks_and_scales():
    line = refusal(PACKED, stored(tensor("down", (3, 2, 64), "BF16")))
    assert "lacks 2 tensors that its config.json asks for: down_blocks, down_scales. " in line


def test_a_plain_weight_is_not_accepted_in_blocks():
    line = refusal({"a": Parameter("a", (3, 32))}, stored(tensor("a", (3, 2, 16))))
    assert line.startswith("a is [3, 2, 16] in the checkpoint, config.json makes it [3, 32]")


# Two weights read by three nodes; b is read twice.
GRAPH = """(float[tokens, 3] x, float[3, 5] a, float[3, 5] b) => (float[tokens, 5] y) {
    left = MatMul(x, a)
    right = MatMul(x, b)
    both = Add(left, right)
    z = MatMul(x, b)
    y = Add(both, z)
}"""
NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def bound(
    tmp_path: Path, dtype: str = "F32", want: dict[str, Parameter] | None = None
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """GRAPH with its weights in a checkpoint of this dtype, written beside it; and the weights."""
    random = np.random.default_rng(0)
    values = {n: random.standard_normal(SHAPE).astype(NUMPY[dtype]) for n in ("a", "b")}
    save_file(values, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 23]> g {GRAPH}')
    weights.bind(model, want or wanted("a", "b"), open_checkpoint(tmp_path), TensorProto.FLOAT)
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


def test_a_weight_that_is_taken_as_stored_is_not_cast(tmp_path):
    want = wanted("a", "b") | {"a": Parameter("a", SHAPE, dtype="W")}
    model, _ = bound(tmp_path, "BF16", want)
    assert [list(n.input) for n in model.graph.node if n.op_type == "Cast"] == [["b"]]
    readers = [n for n in model.graph.node if "a" in n.input]
    assert [n.op_type for n in readers] == ["MatMul"]
    types = {t.name: t.data_type for t in model.graph.initializer}
    assert types == dict.fromkeys(("a", "b"), TensorProto.BFLOAT16)


# A table that is read by rows, and turned to be multiplied with, as where embedding and head are tied; and scaled.
TIED_GRAPH = """(int64[tokens] i, float[7, 3] table) => (float[tokens, 7] y, float[7, 3] z) {
    [rows] rows = Gather(table, i)
    [turned] turned = Transpose <perm = [1, 0]> (table)
    [y] y = MatMul(rows, turned)
    [z] z = Add(table, table)
}"""


@pytest.mark.parametrize(
    ("stored", "dtype", "chains"),
    [
        ("BF16", "float", {"MatMul-Cast-Gather", "MatMul-Cast-Transpose", "Add-Cast"}),
        ("F16", "float", {"MatMul-Cast-Gather", "MatMul-Cast-Transpose", "Add-Cast"}),
        ("F32", "float", {"MatMul-Gather", "MatMul-Transpose", "Add"}),
        # What is folded on the way is narrow here after the Cast.
        ("F32", "float16", {"MatMul-Gather-Cast", "MatMul-Transpose-Cast", "Add-Cast"}),
    ],
)
def test_a_table_is_turned_and_gathered_from_in_the_narrower_type(tmp_path, stored, dtype, chains):
    values = np.random.default_rng(0).standard_normal((7, 3)).astype(NUMPY[stored])
    save_file({"table": values}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    text = f'<ir_version: 10, opset_import: ["": 23]> g {TIED_GRAPH}'.replace("float[", f"{dtype}[")
    model = onnx.parser.parse_model(text)
    element = model.graph.output[0].type.tensor_type.elem_type
    weights.bind(model, {"table": Parameter("table", (7, 3))}, open_checkpoint(tmp_path), element)
    nodes = model.graph.node
    makers = {n.output[0]: n for n in nodes}

    def chain(node: onnx.NodeProto, name: str) -> str:
        return f"{node.op_type}-{chain(makers[name], makers[name].input[0])}" if name in makers else node.op_type

    assert {chain(n, i) for n in nodes if n.op_type in ("MatMul", "Add") for i in n.input} == chains
    assert len({n.name for n in nodes}) == len(nodes)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    y, z = session.run(None, {"i": np.array([2, 5, 2])})
    table = values.astype(y.dtype)
    assert compare(table[[2, 5, 2]] @ table.T, y).excess(TOLERANCE[str(y.dtype)]) <= 1
    assert np.array_equal(z, table + table)


# Experts' matrices stacked, and one that is read as it is stored.
STACKED_GRAPH = """(float[tokens, 5] x, float[2, 4, 5] gate_up) => (float[2, tokens, 4] y) {
    turned = Transpose <perm = [0, 2, 1]> (gate_up)
    y = MatMul(x, turned)
}"""


def bound_stack(tmp_path: Path, dtype: str, parameter: Parameter) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """STACKED_GRAPH with its weight in parts, over two shards."""
    random = np.random.default_rng(0)
    values = {n: random.standard_normal((2, 5)).astype(NUMPY[dtype]) for n in PARTS}
    index = {n: f"model-{i // 2}.safetensors" for i, n in enumerate(PARTS)}
    for file in sorted(set(index.values())):
        save_file({n: v for n, v in values.items() if index[n] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "config.json").write_text("{}")
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 23]> g {STACKED_GRAPH}')
    weights.bind(model, {"gate_up": parameter}, open_checkpoint(tmp_path), TensorProto.FLOAT)
    return model, values


@pytest.mark.parametrize("dtype", NUMPY)
def test_onnx_runtime_stacks_parts_in_their_order(tmp_path, dtype):
    model, values = bound_stack(tmp_path, dtype, STACK)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    # One row at a time of a unit matrix: every product is exact.
    found = session.run(None, {"x": np.eye(5, dtype=np.float32)})[0]
    experts = [np.concatenate([values[f"e{e}.gate"], values[f"e{e}.up"]]).astype(np.float32).T for e in range(2)]
    assert np.array_equal(found, np.stack(experts))


def test_parts_lie_where_the_checkpoint_has_them(tmp_path):
    model, values = bound_stack(tmp_path, "BF16", STACK)
    external = {t.name: t for t in model.graph.initializer if t.external_data}
    assert external.keys() == set(PARTS)
    for name, initializer in external.items():
        where = {e.key: e.value for e in initializer.external_data}
        start, length = int(where["offset"]), int(where["length"])
        file = (tmp_path / where["location"]).read_bytes()
        assert file[start : start + length] == values[name].tobytes()
    assert sum(t.ByteSize() for t in model.graph.initializer if not t.external_data) < 100


@pytest.mark.parametrize(("dtype", "casts"), [("T", 1), ("W", 0)])
def test_a_stack_is_cast_once_or_never(tmp_path, dtype, casts):
    model, _ = bound_stack(tmp_path, "BF16", dataclasses.replace(STACK, dtype=dtype))
    operators = [n.op_type for n in model.graph.node]
    assert operators.count("Cast") == casts
    [stack] = [v for v in model.graph.value_info if v.name == "gate_up"]
    assert stack.type.tensor_type.elem_type == TensorProto.BFLOAT16


def test_packed_bytes_are_bound_in_the_shape_that_the_graph_takes(tmp_path):
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (3, 2, 2, 16), np.uint8)
    save_file({"down_blocks": blocks}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    graph = "(int64[1] which, uint8[3, 2, 32] down_blocks) => (uint8[1, 2, 32] y) { y = Gather(down_blocks, which) }"
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 23]> g {graph}')
    weights.bind(model, {"down_blocks": BLOCKS}, open_checkpoint(tmp_path), TensorProto.FLOAT)
    [initializer] = model.graph.initializer
    assert (initializer.data_type, list(initializer.dims)) == (TensorProto.UINT8, [3, 2, 32])
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {"which": np.array([1])})[0]
    assert np.array_equal(found, blocks[1:2].reshape(1, 2, 32))


def test_an_error_names_no_more_than_it_must():
    line = refusal(wanted("a"), stored(tensor("a"), *(tensor(f"extra.{i}") for i in range(5000))))
    assert len(re.findall(r"extra\.", line)) == weights.LISTED
