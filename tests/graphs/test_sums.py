"""sum_of: what whole numbers are sums of, as graphs tell."""

from __future__ import annotations

import onnx.parser
import onnx_graphsurgeon as gs
import pytest

from llmexport.graphs.sums import ONE, Dimension, Sum, plus, sum_of

HELD = """int64 two = {2}, int64[3] twos = {2, 2, 2}, int64[2] more = {1, 2}, int64[1] axis = {1},
  float[1] half = {0.5}"""
N, T = ONE, Dimension("T")


def found(nodes: str) -> Sum:
    ports = "(int64[B] a, int64[B] b, float[B,T,4] x, float[B] f, int64[1] T) => (int64[N] y)"
    text = f'<ir_version: 10, opset_import: ["": 21]> g {ports} <{HELD}> {{ {nodes} }}'
    made = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))
    [y] = gs.import_onnx(made).outputs
    return sum_of(y)


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("y = Identity(a)", {"a": 1}),
        ("y = Add(a, b)", {"a": 1, "b": 1}),
        ("c = Sub(a, b) y = Add(c, b)", {"a": 1}),
        ("c = Sub(a, b) y = Sub(c, a)", {"b": -1}),
        ("c = Add(a, two) y = Sub(c, twos)", {"a": 1}),
        ("y = Sub(a, two)", {"a": 1, N: -2}),
        ("y = Add(a, more)", {"a": 1, "more": 1}),
        ("c = Cast<to = 6>(a) d = Unsqueeze(c, axis) e = Squeeze(d, axis) y = Cast<to = 7>(e)", {"a": 1}),
        ("s = Shape<start = 1, end = 2>(x) t = Squeeze(s) y = Add(a, t)", {"a": 1, T: 1}),
        ("s = Shape<start = 2, end = 3>(x) y = Add(a, s)", {"a": 1, N: 4}),
        ("s = Shape(x) y = Identity(s)", {"s": 1}),
        ("m = Mul(a, two) y = Add(m, m)", {"m": 2}),
        ("y = Neg(a)", {"y": 1}),
    ],
)
def test_a_value_is_the_sum_that_its_graph_makes(nodes: str, expected: Sum) -> None:
    assert found(nodes) == expected


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("c = Add(f, f) y = Cast<to = 7>(c)", {"y": 1}),
        ("c = Cast<to = 9>(a) y = Cast<to = 7>(c)", {"y": 1}),
        ("c = Cast<to = 2>(a) y = Cast<to = 7>(c)", {"y": 1}),
        ("c = Add(f, half) y = Cast<to = 7>(c)", {"y": 1}),
        # An input that is called like a dimension.
        ("s = Shape<start = 1, end = 2>(x) c = Add(a, s) y = Sub(c, T)", {"a": 1, T: 1, "T": -1}),
    ],
    ids=["of floats", "by bool", "by bytes", "and a fraction", "a name of both"],
)
def test_what_would_be_rounded_or_cut_is_a_term_of_its_own(nodes: str, expected: Sum) -> None:
    assert found(nodes) == expected


def test_a_dimension_is_added_by_its_name_or_its_number() -> None:
    assert plus({"a": 1}, "T") == {"a": 1, T: 1}
    assert plus({"a": 1, N: -4}, 4) == {"a": 1}


def test_a_dimension_without_a_name_is_nothing_that_is_known() -> None:
    assert plus({"a": 1}, None) is None
    values = [gs.Variable(f"x{i}", "float32", ["B", None]) for i in range(2)]
    lengths = [gs.Variable(f"n{i}", "int64", [1]) for i in range(2)]
    for value, length in zip(values, lengths, strict=True):
        gs.Node("Shape", length.name, {"start": 1, "end": 2}, [value], [length])
    assert [sum_of(v) for v in lengths] == [{"n0": 1}, {"n1": 1}]
