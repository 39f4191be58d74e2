"""stitch: pieces joined by name, nothing recomputed, nothing shared by accident."""

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest

from llmexport.graphs.stitch import Piece, stitch
from llmexport.plugins.spec import DOMAIN, VERSION
from llmexport.validate.compare import compare

FLOAT = onnx.TensorProto.FLOAT
OPSET = 23
# y = h * scale + shift; scale is a parameter, shift a constant that each copy brings along.
SCALE = """(float[tokens, 3] h, float[3] scale) => (float[tokens, 3] y) <float[tokens, 3] scaled, float shift = {1}> {
    [node_mul] scaled = Mul(h, scale)
    [node_add] y = Add(scaled, shift)
}"""


def piece_graph(text: str) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {OPSET}]> g {text}')
    onnx.checker.check_model(model)
    return model


def value(name: str, *shape: int | str) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, FLOAT, shape or ["tokens", 3])


def scale(name: str, source: str, target: str, weight: str) -> Piece:
    return Piece(name, piece_graph(SCALE), {"h": source, "y": target, "scale": weight})


def two(weights: tuple[str, str] = ("a.scale", "b.scale")) -> onnx.ModelProto:
    """One graph twice, in a row."""
    pieces = [scale("a", "x", "middle", weights[0]), scale("b", "middle", "out", weights[1])]
    return stitch(pieces, [value("x")], [value("out")], opset=OPSET)


def run(model: onnx.ModelProto, **feeds: np.ndarray) -> np.ndarray:
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def test_joins_a_piece_to_the_one_before_it():
    seed = np.random.default_rng(0)
    x, a, b = (seed.standard_normal(s).astype(np.float32) for s in ((5, 3), 3, 3))
    expected = (x * a + 1) * b + 1
    assert compare(expected, run(two(), x=x, **{"a.scale": a, "b.scale": b})).max_abs == 0


def test_parameters_become_inputs_after_the_given_ones_in_order_of_use():
    assert [i.name for i in two().graph.input] == ["x", "a.scale", "b.scale"]


def test_a_parameter_keeps_its_type_and_shape():
    (parameter,) = (i for i in two().graph.input if i.name == "a.scale")
    assert parameter == value("a.scale", 3)


def test_outputs_are_the_given_ones():
    assert list(two().graph.output) == [value("out")]


def test_a_tied_weight_is_one_input_for_both_that_read_it():
    model = two(("shared", "shared"))
    assert [i.name for i in model.graph.input] == ["x", "shared"]
    x, shared = np.ones((2, 3), np.float32), np.array([2, 3, 4], np.float32)
    assert compare((x * shared + 1) * shared + 1, run(model, x=x, shared=shared)).max_abs == 0


def test_values_of_two_copies_of_a_graph_do_not_collide():
    made = [name for node in two().graph.node for name in node.output]
    assert made == ["a/scaled", "middle", "b/scaled", "out"]


def test_constants_of_two_copies_of_a_graph_do_not_collide():
    assert [t.name for t in two().graph.initializer] == ["a/shift", "b/shift"]


def test_nodes_are_named_by_their_piece():
    assert [n.name for n in two().graph.node] == ["a/mul", "a/add", "b/mul", "b/add"]


def test_types_of_inner_values_are_kept_under_their_new_names():
    typed = {v.name: v for v in two().graph.value_info}
    assert typed.keys() == {"a/scaled", "middle", "b/scaled"}
    assert all(typed[n] == value(n) for n in typed)


def test_the_pieces_stay_as_they_were():
    piece = Piece("a", piece_graph(SCALE), {"h": "x", "y": "out"})
    stitch([piece], [value("x")], [value("out")], opset=OPSET)
    assert piece == Piece("a", piece_graph(SCALE), {"h": "x", "y": "out"})


def test_a_value_without_a_name_in_the_model_is_named_by_its_piece():
    model = stitch([Piece("a", piece_graph(SCALE), {"h": "x", "y": "out"})], [value("x")], [value("out")], opset=OPSET)
    assert [i.name for i in model.graph.input] == ["x", "a/scale"]


def test_an_absent_optional_input_stays_absent():
    clip = piece_graph("(float[tokens, 3] h, float top) => (float[tokens, 3] y) { [node_clip] y = Clip(h, , top) }")
    model = stitch([Piece("a", clip, {"h": "x", "y": "out", "top": "top"})], [value("x")], [value("out")], opset=OPSET)
    assert list(model.graph.node[0].input) == ["x", "", "top"]


def test_an_inner_value_may_be_an_output_too():
    pieces = [scale("a", "x", "middle", "w"), scale("b", "middle", "out", "w")]
    model = stitch(pieces, [value("x")], [value("out"), value("middle")], opset=OPSET)
    onnx.checker.check_model(model, full_check=True)
    assert "middle" not in {v.name for v in model.graph.value_info}


def test_the_model_imports_the_opset_and_our_domain():
    assert {(o.domain, o.version) for o in two().opset_import} == {("", OPSET), (DOMAIN, VERSION)}


def test_refuses_two_pieces_that_make_one_value():
    pieces = [scale("a", "x", "out", "w"), scale("b", "x", "out", "w")]
    with pytest.raises(ValueError, match="b makes out, which a block before it made"):
        stitch(pieces, [value("x")], [value("out")], opset=OPSET)


def test_refuses_a_piece_that_makes_a_graph_input():
    with pytest.raises(ValueError, match="a makes x"):
        stitch([scale("a", "x", "x", "w")], [value("x")], [value("x")], opset=OPSET)


def test_refuses_two_pieces_of_one_name():
    pieces = [scale("a", "x", "middle", "w"), scale("a", "middle", "out", "w")]
    with pytest.raises(ValueError, match="a makes a/scaled"):
        stitch(pieces, [value("x")], [value("out")], opset=OPSET)


@pytest.mark.parametrize("other", ["float[1]", "float[3, 1]", "double[3]"])
def test_refuses_one_parameter_with_two_shapes_or_types(other):
    same = piece_graph(f"({other} scale) => ({other} y) {{ [node_same] y = Identity(scale) }}")
    pieces = [scale("a", "x", "middle", "w"), Piece("b", same, {"y": "out", "scale": "w"})]
    with pytest.raises(ValueError, match="b uses w with another shape or type"):
        stitch(pieces, [value("x")], [value("out")], opset=OPSET)


def test_refuses_a_value_that_is_used_before_it_is_made():
    pieces = [scale("b", "middle", "out", "w"), scale("a", "x", "middle", "w")]
    with pytest.raises(ValueError, match="middle"):
        stitch(pieces, [value("x")], [value("out")], opset=OPSET)
