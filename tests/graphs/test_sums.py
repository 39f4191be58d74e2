"""sum_of: what whole numbers are sums of, as graphs tell."""

import onnx.parser
import onnx_graphsurgeon as gs
import pytest

from llmexport.graphs.sums import plus, sum_of

HELD = "int64 two = {2}, int64[3] twos = {2, 2, 2}, int64[2] more = {1, 2}, int64[1] axis = {1}"


def found(nodes: str) -> dict[str, int]:
    ports = "(int64[B] a, int64[B] b, float[B,T,4] x) => (int64[N] y)"
    text = f'<ir_version: 10, opset_import: ["": 21]> g {ports} <{HELD}> {{ {nodes} }}'
    [y] = gs.import_onnx(onnx.parser.parse_model(text)).outputs
    return dict(sum_of(y))


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("y = Identity(a)", {"a": 1}),
        ("y = Add(a, b)", {"a": 1, "b": 1}),
        ("c = Sub(a, b) y = Add(c, b)", {"a": 1}),
        ("c = Sub(a, b) y = Sub(c, a)", {"b": -1}),
        ("c = Add(a, two) y = Sub(c, twos)", {"a": 1}),
        ("y = Sub(a, two)", {"a": 1, "": -2}),
        ("y = Add(a, more)", {"a": 1, "more": 1}),
        ("c = Cast<to = 6>(a) d = Unsqueeze(c, axis) y = Squeeze(d, axis)", {"a": 1}),
        ("s = Shape<start = 1, end = 2>(x) t = Squeeze(s) y = Add(a, t)", {"a": 1, "T": 1}),
        ("s = Shape<start = 2, end = 3>(x) y = Add(a, s)", {"a": 1, "": 4}),
        ("s = Shape(x) y = Identity(s)", {"s": 1}),
        ("m = Mul(a, two) y = Add(m, m)", {"m": 2}),
        ("y = Neg(a)", {"y": 1}),
    ],
)
def test_a_value_is_the_sum_that_its_graph_makes(nodes: str, expected: dict[str, int]) -> None:
    assert found(nodes) == expected


def test_a_dimension_is_added_by_its_name_or_its_number() -> None:
    assert plus({"a": 1}, "T") == {"a": 1, "T": 1}
    assert plus({"a": 1, "": -4}, 4) == {"a": 1}
