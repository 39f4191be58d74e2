"""What TensorRT's parser makes of an operator, computed on this CPU, is what ONNX says of the operator."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import tensorrt_rtx as trt
from network_operators import OPERATORS, Arrays, floats
from one_node import session
from onnx import helper, numpy_helper
from onnx.helper import make_node
from onnx.reference import ReferenceEvaluator

from llmexport.export.network.kinds import Unable
from llmexport.export.network.program import Program
from llmexport.export.network.serve import Stored
from llmexport.validate.compare import compare
from llmexport.validate.tolerance import TOLERANCE

pytestmark = pytest.mark.engine

LOGGER = trt.Logger(trt.Logger.ERROR)  # which must live as long as any network


class Parsed:
    """A network, and what must outlive it."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model.SerializeToString()
        self.builder = trt.Builder(LOGGER)
        self.network = self.builder.create_network(0)
        self.parser = trt.OnnxParser(self.network, LOGGER)
        errors = [] if self.parser.parse(self.model) else [self.parser.get_error(0).desc()]
        assert not errors

    def layers(self, kind: str, class_name: str) -> list[Any]:
        """Those of a kind, with its attributes."""
        every = (self.network.get_layer(i) for i in range(self.network.num_layers))
        found = [layer for layer in every if layer.type.name == kind]
        for layer in found:
            layer.__class__ = getattr(trt, class_name)
        return found

    def program(self, folder: Any = None) -> Program:
        return Program(trt, self.network, Stored(self.model, folder))


def model_of(
    nodes: list[onnx.NodeProto], feed: Arrays, held: Arrays | None = None, outputs: tuple[str, ...] = ("y",)
) -> onnx.ModelProto:
    values = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in feed.items()
    ]
    stored = [numpy_helper.from_array(a, n) for n, a in (held or {}).items()]
    made = [helper.make_empty_tensor_value_info(n) for n in outputs]
    graph = helper.make_graph(nodes, "g", values, made, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    typed = onnx.shape_inference.infer_shapes(model).graph
    del model.graph.output[:]
    model.graph.output.extend(typed.output)
    return model


X = floats(2, 3, 4)


@pytest.mark.parametrize(
    ("operator", "feed", "held", "attributes"), OPERATORS, ids=[f"{i}-{o[0]}" for i, o in enumerate(OPERATORS)]
)
def test_an_operator_is_what_onnx_says(operator: str, feed: Arrays, held: Arrays, attributes: dict[str, Any]) -> None:
    outputs = ("y", "z") if operator == "TopK" else ("y",)
    node = make_node(operator, [*feed, *held], list(outputs), "node", **attributes)
    model = model_of([node], feed, {n: a for n, a in held.items() if n}, outputs)
    wanted = dict(zip(outputs, ReferenceEvaluator(model).run(None, dict(feed)), strict=True))
    parsed = Parsed(model)
    found = parsed.program().run(feed)
    for name in outputs:
        assert found[name].dtype == wanted[name].dtype
        assert compare(np.asarray(wanted[name]), found[name]).excess(TOLERANCE["float32"]) <= 1


def parsed_text(text: str) -> Parsed:
    return Parsed(onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 23]>' + text))


def run_text(text: str, **feed: Any) -> list[np.ndarray]:
    """Here; and what ONNX Runtime makes of it must be the same."""
    parsed = parsed_text(text)
    found = list(parsed.program().run(feed).values())
    for expected, value in zip(session(onnx.ModelProto.FromString(parsed.model)).run(None, feed), found, strict=True):
        assert value.tolist() == expected.tolist()
    return found


def test_integers_are_exact_and_divided_towards_zero() -> None:
    large = 2**53 + 1
    [found] = run_text(
        "g (int64[2] a, int64[2] b) => (int64[2] y) { y = Div (a, b) }", a=np.array([large, -7]), b=np.array([1, 2])
    )
    assert found.tolist() == [large, -3]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_a_layer_computes_in_float32_and_rounds_once(dtype: Any) -> None:
    name = {np.float16: "float16"}.get(dtype, "bfloat16")
    a, b = floats(3, 257, dtype=dtype), floats(257, 5, dtype=dtype)
    parsed = parsed_text(f"g ({name}[3, 257] a, {name}[257, 5] b) => ({name}[3, 5] y) {{ y = MatMul (a, b) }}")
    [found] = parsed.program().run({"a": a, "b": b}).values()
    assert found.dtype == dtype
    assert (found == (a.astype(np.float32) @ b.astype(np.float32)).astype(dtype)).all()


NESTED = """g (int64 rows, int64 columns, int64[R, C] x) => (int64[R] sums, int64 all)
<int64 zero = {0}, bool yes = {1}> {
    all, sums = Loop (rows, yes, zero) <body = outer (int64 i, bool m, int64 all) => (bool o, int64 next, int64 sum) {
        o = Identity (yes)
        row = Gather (x, i)
        sum = Loop (columns, yes, zero) <body = inner (int64 j, bool m, int64 so_far) => (bool n, int64 then) {
            n = Identity (yes)
            entry = Gather (row, j)
            weighted = Mul (entry, i)
            then = Add (so_far, weighted)
        }>
        next = Add (all, sum)
    }>
}"""


def test_a_loop_in_a_loop_is_run_anew_at_each_turn() -> None:
    sums, total = run_text(NESTED, rows=np.array(3), columns=np.array(4), x=np.arange(12).reshape(3, 4))
    assert (sums.tolist(), int(total)) == ([0, 22, 76], 98)


WHILE = """g (int64 most, int64[1] x) => (int64[1] last) <bool yes = {1}, int64 limit = {20}> {
    last = Loop (most, yes, x) <body = turn (int64 i, bool more, int64[1] v) => (bool on, int64[1] w) {
        w = Add (v, v)
        sum = ReduceSum <keepdims = 0> (w)
        on = Less (sum, limit)
    }>
}"""


@pytest.mark.parametrize(("most", "last"), [(3, 24), (2, 12), (0, 3)])
def test_a_loop_ends_where_its_condition_or_its_count_does(most: int, last: int) -> None:
    [found] = run_text(WHILE, most=np.array(most), x=np.array([3]))
    assert found.tolist() == [last]


SCAN = """g (float[N] first, float[T, N] x) => (float[N] last, float[T, N] every, float[T, N] back) {
    last, every, back = Scan (first, x) <
        num_scan_inputs = 1, scan_input_directions = [1], scan_output_directions = [0, 1],
        body = turn (float[N] h, float[N] entry) => (float[N] g, float[N] out, float[N] same) {
            g = Add (h, entry)
            out = Identity (h)
            same = Identity (g)
        }>
}"""


def test_a_scan_goes_over_its_input_backwards_and_puts_its_output_the_other_way_round() -> None:
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    last, every, back = run_text(SCAN, first=np.ones(2, np.float32), x=x)
    assert (last.tolist(), every.tolist()) == ([7, 10], [[1, 1], [5, 6], [7, 9]])
    assert back.tolist() == [[7, 10], [7, 9], [5, 6]]


BRANCHES = """g (bool outer, bool inner, float[N] x, int64[1] at) => (float[1] y) {
    y = If (outer) <then_branch = a () => (float[1] ya) {
        ya = If (inner) <then_branch = b () => (float[1] yb) { yb = Gather (x, at) },
                         else_branch = c () => (float[1] yc) { yc = ReduceMax <keepdims = 1> (x) }>
    }, else_branch = d () => (float[1] yd) { yd = ReduceMin <keepdims = 1> (x) }>
}"""


@pytest.mark.parametrize(("outer", "inner", "value"), [(True, True, 2), (True, False, 5), (False, True, 1)])
def test_a_branch_that_is_not_taken_is_not_computed(outer: bool, inner: bool, value: float) -> None:
    x = np.array([1, 2, 5], np.float32)
    parsed = parsed_text(BRANCHES)
    program, feed = parsed.program(), {"outer": np.array(outer), "inner": np.array(inner), "x": x}
    assert program.run(feed | {"at": np.array([1])})["y"].tolist() == [value]
    if outer and inner:
        with pytest.raises(Unable, match=r"\(GATHER\) .* reads 9 to 9 of 3 entries"):
            program.run(feed | {"at": np.array([9])})
    else:
        assert program.run(feed | {"at": np.array([9])})["y"].tolist() == [value]


def test_a_layer_of_an_unknown_kind_is_named() -> None:
    parsed = parsed_text(
        "g (float[1, 1, 4, 4] x) => (float[1, 1, 3, 3] y) { [the_pool] y = MaxPool <kernel_shape = [2, 2]> (x) }"
    )
    [layer] = parsed.layers("POOLING", "IPoolingLayer")
    with pytest.raises(Unable, match=rf"^layer {layer.name} \(POOLING\): layers of this kind are not known here$"):
        parsed.program()


def test_an_unknown_kind_is_named_though_nobody_reads_the_layer() -> None:
    parsed = parsed_text("g (float[1, 1, 4, 4] x) => (float[1, 1, 4, 4] y) { y = Relu (x) }")
    parsed.network.add_pooling_nd(parsed.network.get_input(0), trt.PoolingType.MAX, (2, 2))
    with pytest.raises(Unable, match=r"\(POOLING\): layers of this kind are not known here"):
        parsed.program()


@pytest.mark.parametrize(
    ("text", "kind", "class_name", "change", "reason"),
    [
        (
            "g (float[1, 1, 4, 4] x) => (float[1, 1, 8, 8] y) <float[4] by = {1, 1, 2, 2}> { y = Resize (x, , by) }",
            *("RESIZE", "IResizeLayer", lambda layer: setattr(layer, "resize_mode", trt.InterpolationMode.CUBIC)),
            "mode CUBIC is not known here",
        ),
        (
            "g (float[1, 2, 4] x, float[2, 2, 3] w) => (float[1, 2, 2] y) { y = Conv (x, w) }",
            *(
                "CONVOLUTION",
                "IConvolutionLayer",
                lambda layer: setattr(layer, "padding_mode", trt.PaddingMode.SAME_UPPER),
            ),
            "padding mode is SAME_UPPER, known here is EXPLICIT_ROUND_DOWN alone",
        ),
        (
            "g (float[1, 2, 4] x, float[4] w, float[4] b) => (float[1, 2, 4] y) { y = LayerNormalization (x, w, b) }",
            *("NORMALIZATION", "INormalizationLayer", lambda layer: setattr(layer, "num_groups", 2)),
            "groups is 2, known here is 1 alone",
        ),
    ],
)
def test_an_unknown_attribute_is_named(text: str, kind: str, class_name: str, change: Any, reason: str) -> None:
    parsed = parsed_text(text)
    [layer] = parsed.layers(kind, class_name)
    change(layer)
    with pytest.raises(Unable, match=rf"^layer .* \({kind}\): {reason}$"):
        parsed.program()


def test_a_shape_that_is_not_what_tensorrt_infers_is_an_error() -> None:
    parsed = parsed_text("g (float[A, 4] x) => (float[B, C] y) { y = Relu (x) }")
    with pytest.raises(Unable, match=r"makes \(2, 3\), TensorRT infers \(-1, 4\)"):
        parsed.program().run({"x": floats(2, 3)})


@pytest.mark.parametrize("held", ["initialiser", "constant", "kernel"])
def test_bf16_weights_are_read_from_the_models_file(held: str) -> None:
    x, weight = floats(1, 2, 4, dtype=ml_dtypes.bfloat16), floats(2, 1, 1, dtype=ml_dtypes.bfloat16)
    weight = weight if held == "kernel" else weight.reshape(1, 2, 1)
    node = (
        make_node("Conv", ["x", "w"], ["y"], "node", group=2)
        if held == "kernel"
        else make_node("Mul", ["x", "w"], ["y"])
    )
    constant = make_node("Constant", [], ["w"], value=numpy_helper.from_array(weight))
    stored = {} if held == "constant" else {"w": weight}
    parsed = Parsed(model_of([constant, node] if held == "constant" else [node], {"x": x}, stored))
    [found] = parsed.program().run({"x": x}).values()
    assert (found == x * weight.reshape(2, 1)).all()
