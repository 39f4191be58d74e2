"""fuse_gated_act: what it fuses, what it refuses, and that the numbers stay."""

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import onnxruntime
import pytest

from llmexport.export.graph_file import load_body
from llmexport.graphs.bodies import attach_bodies
from llmexport.graphs.fuse_gated_act import fuse_gated_act
from llmexport.plugins.spec import DOMAIN

FP32 = "float[batch, tokens, 9]"
FP16 = "float16[batch, tokens, 9]"

# Every form that the docstring accepts: the activation it is, and its nodes from gate and up to y.
FORMS = {
    "gelu": ("gelu_erf", "[act] a = Gelu(gate) [gated] y = Mul(a, up)"),
    "up * gelu": ("gelu_erf", "[act] a = Gelu(gate) [gated] y = Mul(up, a)"),
    "gelu none": ("gelu_erf", '[act] a = Gelu<approximate = "none">(gate) [gated] y = Mul(a, up)'),
    "gelu tanh": ("gelu_tanh", '[act] a = Gelu<approximate = "tanh">(gate) [gated] y = Mul(a, up)'),
    "up * gelu tanh": ("gelu_tanh", '[act] a = Gelu<approximate = "tanh">(gate) [gated] y = Mul(up, a)'),
    "silu": ("silu", "[act] s = Sigmoid(gate) [own] a = Mul(gate, s) [gated] y = Mul(a, up)"),
    "silu, sigmoid first": ("silu", "[act] s = Sigmoid(gate) [own] a = Mul(s, gate) [gated] y = Mul(a, up)"),
    "up * silu": ("silu", "[act] s = Sigmoid(gate) [own] a = Mul(gate, s) [gated] y = Mul(up, a)"),
}


def model(nodes: str, inputs: str = f"{FP32} gate, {FP32} up", outputs: str = f"{FP32} y") -> onnx.ModelProto:
    header = '<ir_version: 10, opset_import: ["": 23, "other": 1]>'
    made = onnx.parser.parse_model(f"{header} g ({inputs}) => ({outputs}) {{ {nodes} }}")
    onnx.checker.check_model(made)
    return onnx.shape_inference.infer_shapes(made, strict_mode=True)


def graph(nodes: str, **ports: str) -> gs.Graph:
    return gs.import_onnx(model(nodes, **ports))


def ops(made: gs.Graph) -> list[str]:
    return [n.op for n in made.nodes]


def refusals(made: gs.Graph) -> list[tuple[str, str]]:
    """What the pass refuses in a graph that it must leave as it is."""
    before = ops(made)
    fused = fuse_gated_act(made)
    assert (fused.count, ops(made)) == (0, before)
    return fused.refused


@pytest.mark.parametrize("form", FORMS)
def test_fuses_to_one_node(form):
    made = graph(FORMS[form][1])
    fused = fuse_gated_act(made)
    assert (fused.count, fused.refused, ops(made)) == (1, [], ["GatedAct"])


@pytest.mark.parametrize("form", FORMS)
def test_the_node_reads_gate_then_up_and_says_which_activation(form):
    made = graph(FORMS[form][1])
    fuse_gated_act(made)
    (node,) = made.nodes
    assert [v.name for v in (*node.inputs, *node.outputs)] == ["gate", "up", "y"]
    assert node.attrs == {"activation": FORMS[form][0], "alpha": 0.0, "limit": 0.0}
    assert (node.name, node.domain) == ("gated/GatedAct", DOMAIN)


@pytest.mark.parametrize("form", FORMS)
def test_fuses_fp16_too(form):
    made = graph(FORMS[form][1], inputs=f"{FP16} gate, {FP16} up", outputs=f"{FP16} y")
    assert fuse_gated_act(made).count == 1


def test_gate_and_up_may_be_one_value():
    made = graph("[act] a = Gelu(gate) [gated] y = Mul(a, gate)")
    assert fuse_gated_act(made).count == 1
    assert [v.name for v in made.nodes[0].inputs] == ["gate", "gate"]


def test_the_gate_may_have_other_readers():
    made = graph("[act] a = Gelu(gate) [neg] z = Neg(gate) [gated] y = Mul(a, up)", outputs=f"{FP32} y, {FP32} z")
    assert fuse_gated_act(made).count == 1
    assert ops(made) == ["Neg", "GatedAct"]


def test_the_node_stands_behind_an_up_that_is_made_late():
    made = graph("[act] a = Gelu(gate) [late] u = Neg(up) [gated] y = Mul(a, u)")
    assert fuse_gated_act(made).count == 1
    assert ops(made) == ["Neg", "GatedAct"]


def test_each_of_two_mlps_fuses():
    made = graph(
        """[act] a = Gelu(gate) [gated] m = Mul(a, up)
        [act_1] s = Sigmoid(m) [own] b = Mul(s, m) [gated_1] y = Mul(b, up)"""
    )
    fused = fuse_gated_act(made)
    assert (fused.count, fused.refused) == (2, [])
    assert [n.attrs["activation"] for n in made.nodes] == ["gelu_erf", "silu"]


BOTH = "float[batch, tokens, 18]"
HALVES = "[split] gate, up = Split<axis = -1, num_outputs = 2>(both)"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("split", [HALVES, HALVES.replace("-1", "2")])
def test_the_halves_of_one_tensor_are_read_where_they_lie(form, split):
    made = graph(f"{split} {FORMS[form][1]}", inputs=f"{BOTH} both")
    fused = fuse_gated_act(made)
    assert (fused.count, fused.refused, ops(made)) == (1, [], ["GatedAct"])
    (node,) = made.nodes
    assert [v.name for v in (*node.inputs, *node.outputs)] == ["both", "y"]


GELU_OF_HALVES = "[act] a = Gelu(gate) [gated] y = Mul(a, up)"


@pytest.mark.parametrize(
    ("nodes", "inputs", "outputs"),
    [
        pytest.param(f"{HALVES} [act] a = Gelu(up) [gated] y = Mul(a, gate)", BOTH, "", id="up first"),
        pytest.param(f"{HALVES} {GELU_OF_HALVES} [neg] z = Neg(gate)", BOTH, f", {FP32} z", id="gate read again"),
        pytest.param(f"{HALVES} {GELU_OF_HALVES} [neg] z = Neg(up)", BOTH, f", {FP32} z", id="up read again"),
        pytest.param(f"{HALVES} {GELU_OF_HALVES}", BOTH, f", {FP32} gate", id="gate is an output"),
        pytest.param(f"{HALVES} {GELU_OF_HALVES}", BOTH, f", {FP32} up", id="up is an output"),
        pytest.param(f"{HALVES} [act] a = Gelu(gate) [gated] y = Mul(a, gate)", BOTH, "", id="one half alone"),
        pytest.param(
            f"[split] gate, up = Split<axis = 1, num_outputs = 2>(both) {GELU_OF_HALVES}",
            "float[batch, 6, 9]",
            "",
            id="another axis",
        ),
        pytest.param(
            f"[split] gate, up, rest = Split<axis = -1, num_outputs = 3>(both) {GELU_OF_HALVES}",
            "float[batch, tokens, 27]",
            f", {FP32} rest",
            id="three parts",
        ),
    ],
)
def test_other_parts_of_a_tensor_stay_split(nodes, inputs, outputs):
    y = "float[batch, 3, 9]" if "6" in inputs else FP32
    made = graph(nodes, inputs=f"{inputs} both", outputs=f"{y} y{outputs}")
    assert fuse_gated_act(made).count == 1
    assert sorted(ops(made)) == sorted(["Split", "GatedAct", *["Neg"] * nodes.count("Neg")])
    assert len(next(n for n in made.nodes if n.op == "GatedAct").inputs) == 2


# Case 1.
def test_refuses_a_sigmoid_times_another_value():
    made = graph("[act] s = Sigmoid(gate) [own] a = Mul(s, up) [gated] y = Mul(a, gate)")
    assert refusals(made) == [("act", "the sigmoid is not multiplied with its own input")]


def test_refuses_a_sigmoid_that_is_added():
    made = graph("[act] s = Sigmoid(gate) [own] a = Add(s, gate) [gated] y = Mul(a, up)")
    assert refusals(made) == [("act", "the sigmoid is not multiplied with its own input")]


def test_refuses_a_sigmoid_with_two_readers():
    made = graph(
        "[act] s = Sigmoid(gate) [own] a = Mul(s, gate) [neg] z = Neg(s) [gated] y = Mul(a, up)",
        outputs=f"{FP32} y, {FP32} z",
    )
    assert refusals(made) == [("act", "the sigmoid has 2 consumers")]


def test_refuses_a_sigmoid_times_itself():
    made = graph("[act] s = Sigmoid(gate) [own] a = Mul(s, s) [gated] y = Mul(a, up)")
    assert refusals(made) == [("act", "the sigmoid has 2 consumers")]


def test_refuses_a_sigmoid_that_is_a_graph_output():
    made = graph("[act] s = Sigmoid(gate) [own] a = Mul(s, gate) [gated] y = Mul(a, up)", outputs=f"{FP32} y, {FP32} s")
    assert refusals(made) == [("act", "the sigmoid is a graph output")]


def test_refuses_a_sigmoid_in_a_product_of_another_domain():
    made = graph("[act] s = Sigmoid(gate) [own] a = other.Mul(s, gate) [gated] y = Mul(a, up)")
    assert refusals(made) == [("act", "the sigmoid is not multiplied with its own input")]


# Case 2.
@pytest.mark.parametrize("act", ["[act] a = Gelu(gate)", "[act] s = Sigmoid(gate) [own] a = Mul(s, gate)"])
def test_refuses_an_activation_with_two_readers(act):
    made = graph(f"{act} [neg] z = Neg(a) [gated] y = Mul(a, up)", outputs=f"{FP32} y, {FP32} z")
    assert refusals(made) == [("act", "the activation has 2 consumers")]


def test_refuses_an_activation_times_itself():
    made = graph("[act] a = Gelu(gate) [gated] y = Mul(a, a)")
    assert refusals(made) == [("act", "the activation has 2 consumers")]


@pytest.mark.parametrize("act", ["[act] a = Gelu(gate)", "[act] s = Sigmoid(gate) [own] a = Mul(s, gate)"])
def test_refuses_an_activation_that_is_a_graph_output(act):
    made = graph(f"{act} [gated] y = Mul(a, up)", outputs=f"{FP32} y, {FP32} a")
    assert refusals(made) == [("act", "the activation is a graph output")]


@pytest.mark.parametrize("act", ["[act] a = Gelu(gate)", "[act] s = Sigmoid(gate) [own] a = Mul(s, gate)"])
def test_refuses_an_activation_that_is_not_multiplied(act):
    made = graph(f"{act} [sum] y = Add(a, up)")
    assert refusals(made) == [("act", "the activation goes to Add, not to a product")]


def test_refuses_an_activation_in_a_product_of_another_domain():
    made = graph("[act] a = Gelu(gate) [gated] y = other.Mul(a, up)")
    assert refusals(made) == [("act", "the activation goes to Mul, not to a product")]


def test_refuses_the_second_activation_of_one_product():
    made = graph("[first] a = Gelu(gate) [second] b = Gelu(up) [gated] y = Mul(a, b)")
    fused = fuse_gated_act(made)
    assert (fused.count, fused.refused) == (
        1,
        [("second", "the activation goes to GatedAct, not to a product")],
    )


# Case 3.
@pytest.mark.parametrize("up", ["float", "float[9]", "float[batch, tokens, 1]", "float[batch, others, 9]"])
def test_refuses_an_up_of_another_shape(up):
    made = graph("[act] a = Gelu(gate) [gated] y = Mul(a, up)", inputs=f"{FP32} gate, {up} up")
    assert refusals(made) == [("act", "gate and up differ in shape")]


def test_refuses_a_gate_that_broadcasts():
    made = graph("[act] a = Gelu(gate) [gated] y = Mul(a, up)", inputs=f"float[9] gate, {FP32} up")
    assert refusals(made) == [("act", "gate and up differ in shape")]


@pytest.mark.parametrize("gate", ["Identity", "other.Make"])
def test_refuses_an_up_of_unknown_shape(gate):
    made = graph(f"[first] g = {gate}(gate) [second] u = other.Make(up) [act] a = Gelu(g) [gated] y = Mul(a, u)")
    assert refusals(made) == [("act", "gate and up differ in shape")]


@pytest.mark.parametrize("shape", ["[tokens, 9]", "[batch, tokens, 3, 9]"])
def test_refuses_another_rank(shape):
    made = graph(
        "[act] a = Gelu(gate) [gated] y = Mul(a, up)",
        inputs=f"float{shape} gate, float{shape} up",
        outputs=f"float{shape} y",
    )
    assert refusals(made) == [("act", "its operands are not of rank 3")]


def test_refuses_doubles():
    double = "double[batch, tokens, 9]"
    made = graph(
        "[act] a = Gelu(gate) [gated] y = Mul(a, up)",
        inputs=f"{double} gate, {double} up",
        outputs=f"{double} y",
    )
    assert refusals(made) == [("act", "its operands are not of one float type")]


@pytest.mark.parametrize("op", ["Gelu", "Sigmoid"])
def test_an_activation_of_another_domain_is_no_candidate(op):
    made = graph(f"[act] a = other.{op}(gate) [gated] y = Mul(a, up)")
    assert refusals(made) == []


@pytest.mark.parametrize("nodes", ["[neg] y = Mul(gate, up)", "[act] a = Gelu(gate) [sum] y = Add(a, up)"])
def test_leaves_a_graph_in_which_nothing_fuses_as_it_is(nodes):
    made = graph(nodes)
    before = gs.export_onnx(made).SerializeToString(deterministic=True)
    assert fuse_gated_act(made).count == 0
    assert gs.export_onnx(made).SerializeToString(deterministic=True) == before


@pytest.fixture(
    scope="module",
    params=[
        ("", "gelu", FP32),
        ("", "gelu tanh", FP32),
        ("", "up * silu", FP32),
        ("", "gelu tanh", FP16),
        ("", "silu", FP16),
        (HALVES, "silu", FP32),
        (HALVES, "gelu tanh", FP16),
    ],
    ids=lambda case: " ".join(case),
)
def both(request: pytest.FixtureRequest) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """A form as it is, and fused with bodies attached."""
    split, form, kind = request.param
    inputs = f"{kind.replace('9', '18')} both" if split else f"{kind} gate, {kind} up"
    before = model(f"{split} {FORMS[form][1]}", inputs, f"{kind} y")
    made = gs.import_onnx(before)
    assert fuse_gated_act(made).count == 1
    after = gs.export_onnx(made, ir_version=10)
    assert attach_bodies(after, load_body) == {"GatedAct": 1}
    return before, after


def test_the_fused_model_is_valid(both):
    onnx.checker.check_model(both[1], full_check=True)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 63), (1, 130)])
def test_numbers_stay(both, batch, tokens):
    element = onnx.helper.tensor_dtype_to_np_dtype(both[0].graph.input[0].type.tensor_type.elem_type)
    seed = np.random.default_rng(tokens)
    gate, up = (3 * seed.standard_normal((2, batch, tokens, 9))).astype(element)
    joined = len(both[0].graph.input) == 1
    feeds = {"both": np.concatenate((gate, up), -1)} if joined else {"gate": gate, "up": up}
    expected, found = (
        onnxruntime.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"])
        .run(None, feeds)[0]
        .astype(np.float64)
        for m in both
    )
    # Before, every node rounds to the graph's type, after, the result alone does. Far below zero 1 + erf and
    # 1 + tanh cancel, and what is left is the rounding of the 1.
    eps = 4 * float(np.finfo(element).eps)
    terms = np.abs(gate.astype(np.float64) * up)
    assert (np.abs(found - expected) <= eps * terms).all()
