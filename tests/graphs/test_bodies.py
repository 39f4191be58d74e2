"""attach_bodies: a body for every custom op, one for each set of attribute values, types and sizes."""

from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest

from llmexport.graphs.bodies import attach_bodies, op_of
from llmexport.plugins.spec import DOMAIN, Attribute

GATED = 'llmexport.GatedAct<activation = "silu", alpha = 0.5, limit = 7.0>'
GELU = 'llmexport.GatedAct<activation = "gelu_erf", alpha = 0.5, limit = 7.0>'
FP32 = "float[batch, tokens, 9]"


def model(text: str) -> onnx.ModelProto:
    header = '<ir_version: 10, opset_import: ["": 23, "llmexport": 1, "other": 1]>'
    return onnx.parser.parse_model(f"{header} g {text}")


class Bodies:
    """Makes bodies that subtract, or add for gelu, and notes what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Attribute], list[str], list[list[int | str]]]] = []

    def __call__(
        self, name: str, attributes: dict[str, Attribute], types: list[str], shapes: list[list[int | str]]
    ) -> onnx.FunctionProto:
        self.asked.append((name, attributes, types, shapes))
        op = "Add" if attributes.get("activation") == "gelu_erf" else "Sub"
        node = onnx.helper.make_node(op, ["gate", "up"], ["y"])
        return onnx.helper.make_function(
            DOMAIN,
            f"{name}__{types[0]}__{attributes.get('activation')}",
            ["gate", "up"],
            ["y"],
            [node],
            [onnx.helper.make_opsetid("", 23)],
            sorted(attributes),
        )


def test_asks_for_a_body_by_name_attributes_type_and_sizes():
    bodies = Bodies()
    attach_bodies(model(f"({FP32} g, {FP32} u) => ({FP32} y) {{ y = {GATED}(g, u) }}"), bodies)
    attributes = {"activation": "silu", "alpha": 0.5, "limit": 7.0}
    assert bodies.asked == [("GatedAct", attributes, ["float32"] * 2, [["batch", "tokens", 9]] * 2)]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_types_are_those_of_the_inputs(dtype):
    kind = dtype.replace("float32", "float") + "[2, 3, 9]"
    bodies = Bodies()
    attach_bodies(model(f"({kind} g, {kind} u) => ({kind} y) {{ y = {GATED}(g, u) }}"), bodies)
    assert bodies.asked[0][2:] == ([dtype] * 2, [[2, 3, 9]] * 2)


def test_the_node_takes_the_name_of_its_body_and_still_says_its_op():
    made = model(f"({FP32} g, {FP32} u) => ({FP32} y) {{ y = {GATED}(g, u) }}")
    assert op_of(made.graph.node[0]) == "GatedAct"
    attach_bodies(made, Bodies())
    assert made.graph.node[0].op_type == made.functions[0].name == "GatedAct__float32__silu"
    assert op_of(made.graph.node[0]) == "GatedAct"
    assert not made.graph.node[0].overload + made.functions[0].overload


def test_counts_every_occurrence_by_op():
    made = model(f"({FP32} g, {FP32} u) => ({FP32} y) {{ a = {GATED}(g, u) b = {GELU}(a, u) y = {GATED}(b, u) }}")
    made.graph.value_info.extend(onnx.helper.make_tensor_value_info(n, 1, ["batch", "tokens", 9]) for n in "ab")
    assert attach_bodies(made, Bodies()) == {"GatedAct": 3}


def test_equal_nodes_share_one_body():
    made = model(f"({FP32} g, {FP32} u) => ({FP32} y, {FP32} z) {{ y = {GATED}(g, u) z = {GATED}(u, g) }}")
    bodies = Bodies()
    attach_bodies(made, bodies)
    assert (len(bodies.asked), len(made.functions)) == (1, 1)


def test_each_set_of_attribute_values_has_its_own_body_in_onnx_runtime():
    made = model(f"({FP32} g, {FP32} u) => ({FP32} y, {FP32} z) {{ y = {GATED}(g, u) z = {GELU}(g, u) }}")
    attach_bodies(made, Bodies())
    onnx.checker.check_model(made, full_check=True)
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    g, u = np.full((1, 2, 9), 5, np.float32), np.full((1, 2, 9), 3, np.float32)
    y, z = session.run(None, {"g": g, "u": u})
    assert (y == 2).all()
    assert (z == 8).all()


def test_an_initializer_says_its_own_type_and_shape():
    made = model(f"({FP32} g) => ({FP32} y) <float[2, 3] u = {{1, 2, 3, 4, 5, 6}}> {{ y = {GATED}(g, u) }}")
    bodies = Bodies()
    attach_bodies(made, bodies)
    assert bodies.asked[0][3][1] == [2, 3]


def test_standard_operators_and_other_domains_get_none():
    made = model(f"({FP32} g, {FP32} u) => ({FP32} y) {{ a = other.GatedAct(g, u) y = Mul(g, u) }}")
    assert attach_bodies(made, Bodies()) == {}
    assert len(made.functions) == 0


def test_a_model_without_custom_ops_stays_as_it_is():
    made = model(f"({FP32} g, {FP32} u) => ({FP32} y) {{ y = Mul(g, u) }}")
    before = made.SerializeToString(deterministic=True)
    attach_bodies(made, Bodies())
    assert made.SerializeToString(deterministic=True) == before


def test_refuses_an_input_whose_type_is_not_known():
    made = model(f"({FP32} g, {FP32} u) => ({FP32} y) {{ a = other.Make(g) [gated] y = {GATED}(a, u) }}")
    with pytest.raises(ValueError, match=r"gated: type.* of a is not known"):
        attach_bodies(made, Bodies())


def test_refuses_an_input_whose_rank_is_not_known():
    made = model(f"({FP32} g, {FP32} u) => ({FP32} y) {{ a = other.Make(g) [gated] y = {GATED}(a, u) }}")
    made.graph.value_info.append(onnx.helper.make_tensor_value_info("a", 1, None))
    with pytest.raises(ValueError, match=r"gated: .* a is not known"):
        attach_bodies(made, Bodies())


def test_a_model_says_the_operators_of_a_runtime_that_its_bodies_have():
    class OfRuntime(Bodies):
        def __call__(self, *asked: Any) -> onnx.FunctionProto:
            made = super().__call__(*asked)
            made.opset_import.add(domain="com.microsoft", version=1)
            return made

    for bodies, others in ((Bodies(), set()), (OfRuntime(), {("com.microsoft", 1)})):
        made = model(f"({FP32} g, {FP32} u) => ({FP32} y, {FP32} z) {{ y = {GATED}(g, u) z = {GELU}(g, u) }}")
        before = {(o.domain, o.version) for o in made.opset_import}
        attach_bodies(made, bodies)
        after = [(o.domain, o.version) for o in made.opset_import]
        assert len(after) == len(set(after))
        assert set(after) == before | others
