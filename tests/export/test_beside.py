"""Large weights leave a model for its inputs, and what it computes stays the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from arch_cases import (
    CASES,
    COMPUTED,
    FEW_MATRICES,
    FIRST,
    IN_FP16,
    MATRIX,
    PRIMARY,
    UNBOUND,
    Case,
    in_each_dtype,
    others_slow,
)
from first_feed import first_feed
from one_node import session
from onnx import TensorProto, helper
from onnx.helper import make_node

from llmexport.export import manifest
from llmexport.export.beside import beside
from llmexport.export.binding import Binding, Operation, Source, weights
from llmexport.export.errors import EngineError
from llmexport.export.graph_file import load
from llmexport.export.tensorrt_form import tensorrt_form
from llmexport.plugins.dtypes import BY_ONNX
from llmexport.validate import runners, stages

Exporter = Callable[..., Path]

# Each architecture in one dtype, and all cases of the first families in both.
ALTERNATING = [(c, "float16" if c in IN_FP16 else "float32") for c in FIRST]
EACH = ALTERNATING + [e for e in in_each_dtype(CASES, ("float32", "float16")) if e[0].arch in PRIMARY]
EACH = [*dict.fromkeys(EACH)]
AT_ONCE = [(c, d) for c, d in ALTERNATING if c.arch in (*PRIMARY, "bert", "gemma3_text", "qwen2_moe")]


def filled(model: onnx.ModelProto, arrays: dict[str, np.ndarray]) -> onnx.ModelProto:
    """The model with arrays in place of the inputs of their names."""
    kept = [v for v in model.graph.input if v.name not in arrays]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    for name, array in arrays.items():
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        model.graph.initializer.append(helper.make_tensor(name, kind, array.shape, array.tobytes(), raw=True))
    return model


@pytest.mark.parametrize(("case", "dtype"), others_slow(EACH, AT_ONCE), ids=str)
def test_a_model_computes_the_same_bits_with_its_weights_bound(case: Case, dtype: str, exported: Exporter) -> None:
    export = manifest.read(exported(case, dtype))
    form = tensorrt_form(load(export, export.graphs[0]))[0]
    taken = onnx.ModelProto.FromString(form.SerializeToString())
    if case.arch in COMPUTED:
        with pytest.raises(EngineError, match=UNBOUND):
            beside(taken, MATRIX)
        return
    arrays = dict(weights(beside(taken, MATRIX), export.weights, export.folder))
    each = 1 if case.arch in FEW_MATRICES else 2
    assert len(arrays) >= each * len(export.graphs[0].assembly.blocks)
    typed = {v.name: BY_ONNX[v.type.tensor_type.elem_type].name for v in form.graph.input}
    feed = {n: a.astype(typed[n]) for n, a in first_feed(export.graphs[0], stages.prompt(export)).items()}
    outputs = []
    for model in (form, filled(taken, arrays)):
        with runners.onnx_runner(model, export.folder) as runner:
            outputs.append(dict(runner.infer(feed)))
    wanted, found = outputs
    assert {n: a.tobytes() for n, a in wanted.items()} == {n: a.tobytes() for n, a in found.items()}


def matrix(name: str, shape: tuple[int, ...], kind: int = TensorProto.BFLOAT16) -> TensorProto:
    """A weight that lies in the file `shard` from byte 8 on."""
    tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "shard"), ("offset", 8), ("length", math.prod(shape) * BY_ONNX[kind].bits // 8)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def model_of(
    nodes: list[onnx.NodeProto], weights: list[TensorProto], kind: int = TensorProto.FLOAT16, **constants: np.ndarray
) -> onnx.ModelProto:
    """Nodes from x [B, T, 4] and ids [B, T] to y; ids are of another graph's where no node reads them."""
    read = {name for n in nodes for name in n.input}
    inputs = {"x": (kind, ["B", "T", 4]), "ids": (TensorProto.INT64, ["B", "T"])}
    values = [helper.make_tensor_value_info(n, *typed) for n, typed in inputs.items() if n in read]
    held = [onnx.numpy_helper.from_array(a, n) for n, a in constants.items()]
    graph = helper.make_graph(nodes, "g", values, [helper.make_empty_tensor_value_info("y")], [*weights, *held])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def stored(name: str, *shape: int, dtype: str = "bfloat16") -> Source:
    return Source(name, "shard", 8, dtype, shape)


CAST, SWAP = (
    make_node("Cast", ["w"], ["w16"], to=TensorProto.FLOAT16),
    make_node("Transpose", ["w"], ["wt"], perm=[1, 0]),
)
CAST_LATER = make_node("Cast", ["wt"], ["wt16"], to=TensorProto.FLOAT16)


def test_a_cast_is_left_to_the_binding_and_the_swap_to_the_product() -> None:
    model = model_of([SWAP, CAST_LATER, make_node("MatMul", ["x", "wt16"], ["y"])], [matrix("w", (6, 4))])
    bindings = beside(model, 1)
    operations = (Operation("cast", "float16"), Operation("reshape", (1, 6, 4)))
    assert bindings == {"w": Binding("float16", (1, 6, 4), (stored("w", 6, 4),), operations)}
    assert [(n.op_type, list(n.input)) for n in model.graph.node] == [("Transpose", ["w"]), ("MatMul", ["x", "wt16"])]
    assert [v.name for v in model.graph.input] == ["x", "w"]
    assert not model.graph.initializer


def test_what_is_stored_as_it_is_read_is_bound_as_it_is_stored() -> None:
    model = model_of([SWAP, make_node("MatMul", ["x", "wt"], ["y"])], [matrix("w", (6, 4))], TensorProto.BFLOAT16)
    [binding] = beside(model, 1).values()
    assert binding.as_stored


@pytest.mark.parametrize("node", [make_node("Mul", ["x", "wt"], ["y"]), make_node("MatMul", ["wt", "x"], ["y"])])
def test_a_swap_before_anything_else_is_left_to_the_binding(node: onnx.NodeProto) -> None:
    model = model_of([SWAP, node], [matrix("w", (4, 6))])
    bindings = beside(model, 1)
    assert bindings == {"w": Binding("bfloat16", (6, 4), (stored("w", 4, 6),), (Operation("transpose", (1, 0)),))}
    assert [n.op_type for n in model.graph.node] == [node.op_type]


def test_experts_one_by_one_are_put_together_where_they_are_bound() -> None:
    nodes = [
        make_node("Concat", ["e0", "e1"], ["rows"], axis=0),
        make_node("Reshape", ["rows", "shape"], ["experts"]),
        make_node("Mul", ["x", "experts"], ["y"]),
    ]
    model = model_of(nodes, [matrix("e0", (3, 4)), matrix("e1", (3, 4))], shape=np.array([2, -1, 4]))
    operations = (Operation("concat", 0), Operation("reshape", (2, 3, 4)))
    assert beside(model, 48) == {
        "experts": Binding("bfloat16", (2, 3, 4), (stored("e0", 3, 4), stored("e1", 3, 4)), operations)
    }


def test_slices_of_a_weight_are_made_where_they_are_bound() -> None:
    """As those of latent attention, whose matrix holds two of each head."""
    nodes = [
        make_node("Reshape", ["w", "shape"], ["heads"]),
        make_node("Slice", ["heads", "three", "five", "one"], ["values"]),
        make_node("MatMul", ["x", "values"], ["y"]),
    ]
    constants = {"three": np.array([3]), "five": np.array([2**62]), "one": np.array([-2])}
    model = model_of(nodes, [matrix("w", (10, 4))], shape=np.array([2, 5, 4]), **constants)
    operations = (Operation("reshape", (2, 5, 4)), Operation("slice", (1, 3, 5)))
    assert beside(model, 1) == {"values": Binding("bfloat16", (2, 2, 4), (stored("w", 10, 4),), operations)}
    assert [n.op_type for n in model.graph.node] == ["MatMul"]


def test_a_table_that_is_embedding_and_head_is_bound_once() -> None:
    nodes = [
        make_node("Gather", ["w", "ids"], ["rows"], axis=0),
        SWAP,
        make_node("MatMul", ["rows", "wt"], ["y"]),
    ]
    model = model_of(nodes, [matrix("w", (6, 4))])
    model.graph.value_info.append(helper.make_tensor_value_info("rows", TensorProto.BFLOAT16, ["B", "T", 4]))
    assert beside(model, 1).keys() == {"w"}
    # ONNX Runtime multiplies no bf16 here.
    for value in (*model.graph.input, *model.graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    table = np.random.default_rng(0).standard_normal((1, 6, 4), np.float32)
    ids = np.array([[0, 5, 2]])
    (found,) = session(model).run(None, {"w": table, "ids": ids})
    assert found.shape == (1, 3, 6)
    assert np.array_equal(found, table[0][ids] @ table[0].T)


def test_a_weight_that_a_branch_reads_is_renamed_there() -> None:
    branch = helper.make_graph(
        [make_node("Mul", ["w16", "w16"], ["inner"])], "branch", [], [helper.make_empty_tensor_value_info("inner")]
    )
    chosen = make_node("If", ["is_wanted"], ["y"], then_branch=branch, else_branch=branch)
    model = model_of([CAST, chosen], [matrix("w", (6, 4))], is_wanted=np.array(True))
    assert beside(model, 1) == {"w": Binding("float16", (6, 4), (stored("w", 6, 4),), (Operation("cast", "float16"),))}
    [left] = model.graph.node
    assert [list(a.g.node[0].input) for a in left.attribute] == [["w", "w"]] * 2


def test_bytes_become_int8_and_are_what_they_were_where_they_are_cast() -> None:
    nodes = [
        make_node("Gather", ["w", "row"], ["bytes"], axis=0),
        make_node("Cast", ["bytes"], ["y"], to=TensorProto.INT32),
    ]
    model = model_of(nodes, [matrix("w", (2, 4), TensorProto.UINT8)], row=np.array(1))
    # A row that is known now is a constant: let it be one that is not.
    model.graph.input.append(helper.make_tensor_value_info("row", TensorProto.INT64, []))
    del model.graph.initializer[1]
    assert beside(model, 1) == {"w": Binding("int8", (2, 4), (stored("w", 2, 4, dtype="int8"),), ())}
    values = np.array([[0, 0, 0, 0], [0, 127, 128, 255]], np.uint8)
    (found,) = session(model).run(None, {"w": values.view(np.int8), "row": np.array(1)})
    assert found.tolist() == [0, 127, 128, 255]


def test_bytes_that_something_else_reads_are_refused() -> None:
    model = model_of([make_node("Mul", ["x", "w"], ["y"], "n")], [matrix("w", (2, 4), TensorProto.UINT8)])
    with pytest.raises(EngineError, match="n: Mul of the bytes w is none that TensorRT takes"):
        beside(model, 1)


def test_a_small_weight_stays_with_what_is_made_of_it() -> None:
    nodes = [CAST, make_node("Neg", ["w16"], ["minus"]), make_node("Mul", ["x", "minus"], ["y"])]
    model = model_of(nodes, [matrix("w", (6, 4))])
    before = onnx.ModelProto.FromString(model.SerializeToString())
    assert beside(model, 49) == {}
    assert model == before


def test_what_no_binding_can_do_to_a_large_weight_is_refused() -> None:
    nodes = [CAST, make_node("Neg", ["w16"], ["minus"], "n"), make_node("Mul", ["x", "minus"], ["y"])]
    with pytest.raises(
        EngineError, match=r"^n: Neg of the weight w16 cannot be done where it is bound: build .* inside$"
    ):
        beside(model_of(nodes, [matrix("w", (6, 4))]), 48)
