"""fuse_add_rms_norm: what it fuses, what it refuses, and that the numbers stay."""

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import onnxruntime
import pytest

from llmexport.export.graph_file import load_body
from llmexport.graphs.bodies import attach_bodies
from llmexport.graphs.fuse_add_rms_norm import fuse_add_rms_norm
from llmexport.plugins.spec import DOMAIN
from llmexport.validate.compare import compare
from llmexport.validate.tolerance import Tolerance

FP32 = "float[batch, tokens, 7]"
FP16 = "float16[batch, tokens, 7]"
BF16 = "bfloat16[batch, tokens, 7]"
FP32_IN = f"{FP32} x, {FP32} residual, float[7] w"
FP16_IN = f"{FP16} x, {FP16} residual, float16[7] w"
BF16_IN = f"{BF16} x, {BF16} residual, bfloat16[7] w"
FLOAT, HALF, BFLOAT = 1, 10, 16  # onnx.TensorProto.DataType
EPSILON = float(np.float32(1e-6))

# What stands around most norms here.
ADD = "[add] sum = Add(x, residual)"
WIDE_W = f"[wide_w] v = Cast<to = {FLOAT}>(w)"
WIDEN = f"[widen] wide = Cast<to = {FLOAT}>(sum)"
NARROW = f"[narrow] y = Cast<to = {HALF}>(normed)"

# Every form that the docstring accepts: inputs, outputs, nodes, and the constant added to the weight.
FORMS = {
    "fp32": (FP32_IN, f"{FP32} y, {FP32} sum", f"{ADD} [norm] y = RMSNormalization<epsilon = 1e-6>(sum, w)", None),
    "fp32, 1 + w": (
        FP32_IN,
        f"{FP32} y",
        f"[scale] v = Add(w, one) {ADD} [norm] y = RMSNormalization<epsilon = 1e-6>(sum, v)",
        np.float32(1),
    ),
    "fp16": (FP16_IN, f"{FP16} y, {FP16} sum", f"{ADD} [norm] y = RMSNormalization<epsilon = 1e-6>(sum, w)", None),
    "fp16, 1 + w": (
        FP16_IN,
        f"{FP16} y",
        f"[scale] v = Add(one, w) {ADD} [norm] y = RMSNormalization<epsilon = 1e-6>(sum, v)",
        np.float16(1),
    ),
    "fp16 in fp32": (
        FP16_IN,
        f"{FP16} y",
        f"{WIDE_W} {ADD} {WIDEN} [norm] normed = RMSNormalization<epsilon = 1e-6>(wide, v) {NARROW}",
        None,
    ),
    "fp16 in fp32, 1 + w": (
        FP16_IN,
        f"{FP16} y, {FP16} sum",
        f"""{WIDE_W} [scale] u = Add(v, one) {ADD} {WIDEN}
        [norm] normed = RMSNormalization<epsilon = 1e-6>(wide, u) {NARROW}""",
        np.float32(1),
    ),
}


def model(nodes: str, inputs: str, outputs: str, constants: dict[str, np.ndarray]) -> onnx.ModelProto:
    header = '<ir_version: 10, opset_import: ["": 23, "other": 1]>'
    made = onnx.parser.parse_model(f"{header} g ({inputs}) => ({outputs}) {{ {nodes} }}")
    made.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items())
    onnx.checker.check_model(made)
    return onnx.shape_inference.infer_shapes(made, strict_mode=True)


def graph(nodes: str, inputs: str = FP32_IN, outputs: str = f"{FP32} y", **constants: np.ndarray) -> gs.Graph:
    return gs.import_onnx(model(nodes, inputs, outputs, constants))


def form_model(form: str) -> onnx.ModelProto:
    inputs, outputs, nodes, one = {**FORMS, **SANDWICHES}[form]
    return model(nodes, inputs, outputs, {} if one is None else {"one": one})


def form_graph(form: str) -> gs.Graph:
    return gs.import_onnx(form_model(form))


def ops(made: gs.Graph) -> list[str]:
    return [n.op for n in made.nodes]


def refusals(made: gs.Graph) -> list[tuple[str, str]]:
    """What the pass refuses in a graph that it must leave as it is."""
    before = ops(made)
    fused = fuse_add_rms_norm(made)
    assert (fused.count, ops(made)) == (0, before)
    return fused.refused


@pytest.mark.parametrize("form", FORMS)
def test_fuses_to_one_node(form):
    made = form_graph(form)
    fused = fuse_add_rms_norm(made)
    assert (fused.count, fused.refused, ops(made)) == (1, [], ["AddRmsNorm"])


@pytest.mark.parametrize("form", FORMS)
def test_the_node_reads_the_summands_and_the_stored_weight(form):
    made = form_graph(form)
    fuse_add_rms_norm(made)
    (node,) = made.nodes
    assert [v.name for v in node.inputs] == ["x", "residual", "w"]
    assert [v.name for v in node.outputs] == ["y", "sum"]
    assert (node.name, node.domain) == ("add/AddRmsNorm", DOMAIN)


@pytest.mark.parametrize(
    ("form", "round_before_weight", "offset"),
    [
        ("fp32", 1, 0.0),
        ("fp32, 1 + w", 1, 1.0),
        ("fp16", 1, 0.0),
        ("fp16, 1 + w", 1, 1.0),
        ("fp16 in fp32", 0, 0.0),
        ("fp16 in fp32, 1 + w", 0, 1.0),
    ],
)
def test_the_attributes_say_what_the_form_computes(form, round_before_weight, offset):
    made = form_graph(form)
    fuse_add_rms_norm(made)
    assert made.nodes[0].attrs == {
        "epsilon": EPSILON,
        "round_before_weight": round_before_weight,
        "weight_offset": offset,
    }


def test_bf16_in_fp32_fuses_like_fp16():
    made = graph(
        f"""{WIDE_W}
        {ADD}
        {WIDEN}
        [norm] normed = RMSNormalization(wide, v)
        [narrow] y = Cast<to = {BFLOAT}>(normed)""",
        inputs=BF16_IN,
        outputs=f"{BF16} y",
    )
    assert fuse_add_rms_norm(made).refused == []
    assert ops(made) == ["AddRmsNorm"]


def test_a_bf16_offset_is_read():
    made = graph(
        f"[scale] v = Add(w, one) {ADD} [norm] y = RMSNormalization(sum, v)",
        inputs=BF16_IN,
        outputs=f"{BF16} y",
        one=np.array(1, ml_dtypes.bfloat16),
    )
    fuse_add_rms_norm(made)
    assert made.nodes[0].attrs["weight_offset"] == 1.0


def test_epsilon_is_the_operators_default_where_the_norm_has_none():
    made = graph(f"{ADD} [norm] y = RMSNormalization(sum, w)")
    fuse_add_rms_norm(made)
    assert np.float32(made.nodes[0].attrs["epsilon"]) == np.float32(1e-5)


def test_the_summands_keep_the_order_of_the_add():
    made = graph("[add] sum = Add(residual, x) [norm] y = RMSNormalization(sum, w)")
    fuse_add_rms_norm(made)
    assert [v.name for v in made.nodes[0].inputs] == ["residual", "x", "w"]


def test_the_last_axis_may_be_counted_from_the_front():
    made = graph(f"{ADD} [norm] y = RMSNormalization<axis = 2>(sum, w)")
    assert fuse_add_rms_norm(made).count == 1


def test_the_sum_may_have_other_readers_which_stay_behind_it():
    made = graph(f"{ADD} [neg] z = Neg(sum) [norm] y = RMSNormalization(sum, w)", outputs=f"{FP32} y, {FP32} z")
    assert fuse_add_rms_norm(made).count == 1
    assert ops(made) == ["AddRmsNorm", "Neg"]


def test_a_widened_sum_may_have_other_readers():
    made = graph(
        f"{WIDE_W} {ADD} {WIDEN} [norm] normed = RMSNormalization(wide, v) {NARROW} [neg] z = Neg(wide)",
        inputs=FP16_IN,
        outputs=f"{FP16} y, {FP32} z",
    )
    assert fuse_add_rms_norm(made).count == 1
    assert ops(made) == ["AddRmsNorm", "Cast", "Neg"]


def test_a_sum_that_is_the_next_residual_fuses_again():
    made = graph("""[add_0] sum_0 = Add(x, residual)
        [norm_0] y_0 = RMSNormalization(sum_0, w)
        [add_1] sum_1 = Add(sum_0, y_0)
        [norm_1] y = RMSNormalization(sum_1, w)""")
    fused = fuse_add_rms_norm(made)
    assert (fused.count, fused.refused, ops(made)) == (2, [], ["AddRmsNorm", "AddRmsNorm"])


# Forms of a norm before the sum, each in the form of the one behind it: inputs, nodes, and the constant added.
SANDWICHES = {
    "sandwich, fp32": (
        f"{FP32_IN}, float[7] u",
        f"{FP32} y, {FP32} sum",
        """[post] a = RMSNormalization<epsilon = 1e-6>(x, u) [add] sum = Add(residual, a)
        [norm] y = RMSNormalization<epsilon = 1e-6>(sum, w)""",
        None,
    ),
    "sandwich, fp16, normed first": (
        f"{FP16_IN}, float16[7] u",
        f"{FP16} y, {FP16} sum",
        """[post] a = RMSNormalization<epsilon = 1e-6>(x, u) [add] sum = Add(a, residual)
        [norm] y = RMSNormalization<epsilon = 1e-6>(sum, w)""",
        None,
    ),
    "sandwich, fp16 in fp32, 1 + w": (
        f"{FP16_IN}, float16[7] u",
        f"{FP16} y, {FP16} sum",
        f"""[wide_u] wide_u = Cast<to = {FLOAT}>(u) [scale_u] scale_u = Add(wide_u, one)
        {WIDE_W} [scale] scale = Add(v, one) [widen_x] wide_x = Cast<to = {FLOAT}>(x)
        [post] p = RMSNormalization<epsilon = 1e-6>(wide_x, scale_u) [narrow_x] a = Cast<to = {HALF}>(p)
        [add] sum = Add(residual, a) {WIDEN} [norm] normed = RMSNormalization<epsilon = 1e-6>(wide, scale) {NARROW}""",
        np.float32(1),
    ),
}


@pytest.mark.parametrize("form", SANDWICHES)
def test_a_norm_before_the_sum_is_taken_in(form):
    made = form_graph(form)
    fused = fuse_add_rms_norm(made)
    assert (fused.count, fused.refused, ops(made)) == (1, [], ["AddRmsNorm"])
    assert [v.name for v in made.nodes[0].inputs] == ["x", "residual", "w", "u"]
    assert [v.name for v in made.nodes[0].outputs] == ["y", "sum"]


POST = "[post] a = RMSNormalization(x, u)"
SUM = "[add] sum = Add(residual, a) [norm] y = RMSNormalization(sum, w)"


# Nodes around a norm that stays, and what is an output beside y.
STAYS = {
    "read by another": (f"{POST} {SUM} [neg] z = Neg(a)", f", {FP32} z"),
    "a graph output": (f"{POST} {SUM}", f", {FP32} a"),
    "another epsilon": (f"[post] a = RMSNormalization<epsilon = 0.5>(x, u) {SUM}", ""),
    "another offset": (f"[one] v = Add(u, one) [post] a = RMSNormalization(x, v) {SUM}", ""),
    "a computed weight": (f"[late] v = Neg(u) [post] a = RMSNormalization(x, v) {SUM}", ""),
    "added to itself": (f"{POST} {SUM.replace('residual, a', 'a, a')}", ""),
    "changed before it is added": (f"[post] p = RMSNormalization(x, u) [neg] a = Neg(p) {SUM}", ""),
}


@pytest.mark.parametrize("why", STAYS)
def test_another_norm_before_the_sum_stays_and_is_named(why):
    nodes, outputs = STAYS[why]
    made = graph(nodes, f"{FP32_IN}, float[7] u", f"{FP32} y{outputs}", one=np.float32(1))
    fused = fuse_add_rms_norm(made)
    assert (fused.count, fused.refused) == (1, [("post", "its input is not a sum")])
    assert len(next(n for n in made.nodes if n.op == "AddRmsNorm").inputs) == 3


def test_a_norm_of_another_rounding_before_the_sum_stays():
    nodes = f"{POST} [add] sum = Add(residual, a) {WIDE_W} {WIDEN}"
    made = graph(f"{nodes} [norm] normed = RMSNormalization(wide, v) {NARROW}", f"{FP16_IN}, float16[7] u", f"{FP16} y")
    assert fuse_add_rms_norm(made).count == 1
    assert ops(made) == ["RMSNormalization", "AddRmsNorm"]


# Case 1.
def test_refuses_a_norm_of_a_graph_input():
    made = graph("[norm] y = RMSNormalization(x, w)", inputs=f"{FP32} x, float[7] w")
    assert refusals(made) == [("norm", "its input is not a sum")]


def test_refuses_a_norm_of_a_product():
    made = graph("[mul] product = Mul(x, residual) [norm] y = RMSNormalization(product, w)")
    assert refusals(made) == [("norm", "its input is not a sum")]


def test_refuses_an_add_of_another_domain():
    made = graph("[add] sum = other.Add(x, residual) [norm] y = RMSNormalization(sum, w)")
    assert refusals(made) == [("norm", "its input is not a sum")]


# Case 2.
def test_refuses_a_norm_over_two_axes():
    made = graph(
        f"{ADD} [norm] y = RMSNormalization<axis = 1>(sum, w)",
        inputs="float[batch, 5, 7] x, float[batch, 5, 7] residual, float[5, 7] w",
        outputs="float[batch, 5, 7] y",
    )
    assert refusals(made) == [("norm", "it normalises from axis 1, not the last")]


def test_refuses_statistics_that_are_not_in_fp32():
    made = graph(f"{ADD} [norm] y = RMSNormalization<stash_type = {HALF}>(sum, w)", inputs=FP16_IN, outputs=f"{FP16} y")
    assert refusals(made) == [("norm", "its statistics are not in fp32")]


# Case 3.
@pytest.mark.parametrize("residual", ["float[7]", "float[batch, 1, 7]", "float[batch, tokens, 1]"])
def test_refuses_a_sum_that_broadcasts(residual):
    made = graph(f"{ADD} [norm] y = RMSNormalization(sum, w)", inputs=f"{FP32} x, {residual} residual, float[7] w")
    assert refusals(made) == [("norm", "the sum broadcasts")]


def test_refuses_summands_that_may_differ_in_length():
    made = graph(
        f"{ADD} [norm] y = RMSNormalization(sum, w)", inputs=f"{FP32} x, float[batch, others, 7] residual, float[7] w"
    )
    assert refusals(made) == [("norm", "the sum broadcasts")]


def test_refuses_a_summand_of_unknown_shape():
    made = graph(
        f"[made] residual = other.Make(x) {ADD} [norm] y = RMSNormalization(sum, w)", inputs=f"{FP32} x, float[7] w"
    )
    assert refusals(made) == [("norm", "the sum broadcasts")]


@pytest.mark.parametrize("shape", ["[tokens, 7]", "[batch, tokens, 3, 7]"])
def test_refuses_a_sum_of_another_rank(shape):
    made = graph(
        f"{ADD} [norm] y = RMSNormalization(sum, w)",
        inputs=f"float{shape} x, float{shape} residual, float[7] w",
        outputs=f"float{shape} y",
    )
    assert refusals(made) == [("norm", "its operands are not of rank 3")]


def test_refuses_a_sum_of_doubles():
    made = graph(
        f"{ADD} [norm] y = RMSNormalization(sum, w)",
        inputs="double[batch, tokens, 7] x, double[batch, tokens, 7] residual, double[7] w",
        outputs="double[batch, tokens, 7] y",
    )
    assert refusals(made) == [("norm", "its operands are not of one float type")]


# Case 4.
@pytest.mark.parametrize("weight", ["float[1]", "float[1, 7]", "float[tokens, 7]"])
def test_refuses_a_weight_that_is_not_one_value_per_channel(weight):
    made = graph(f"{ADD} [norm] y = RMSNormalization(sum, w)", inputs=f"{FP32} x, {FP32} residual, {weight} w")
    assert refusals(made) == [("norm", "the weight is not one value per channel")]


def test_refuses_a_weight_of_another_type():
    made = graph(
        f"""{ADD}
        {WIDEN}
        [norm] normed = RMSNormalization(wide, w)
        [narrow] half = Cast<to = {HALF}>(normed)
        [back] y = Cast<to = {FLOAT}>(half)""",
        inputs=f"{FP16} x, {FP16} residual, float[7] w",
    )
    assert refusals(made) == [("norm", "the weight is float32, the sum float16")]


def test_refuses_a_bf16_sum_with_an_fp32_weight():
    made = graph(
        f"""{ADD} {WIDEN} [norm] normed = RMSNormalization(wide, w) [narrow] y = Cast<to = {BFLOAT}>(normed)""",
        inputs=f"{BF16} x, {BF16} residual, float[7] w",
        outputs=f"{BF16} y",
    )
    assert refusals(made) == [("norm", "the weight is float32, the sum bfloat16")]


# Whatever it is computed from, it may be made after the sum, or even of it.
@pytest.mark.parametrize(
    "nodes",
    [
        f"[scale] v = Add(w, w) {ADD} [norm] y = RMSNormalization(sum, v)",
        f"{ADD} [late] v = Neg(w) [norm] y = RMSNormalization(sum, v)",
        f"{ADD} [mean] v = ReduceMean<keepdims = 0>(sum, axes) [norm] y = RMSNormalization(sum, v)",
    ],
)
def test_refuses_a_weight_that_is_computed(nodes):
    assert refusals(graph(nodes, axes=np.array([0, 1]))) == [("norm", "the weight is computed")]


# Case 5.
def test_refuses_the_second_norm_of_a_sum():
    made = graph(
        f"{ADD} [first] y = RMSNormalization(sum, w) [second] z = RMSNormalization(sum, w)",
        outputs=f"{FP32} y, {FP32} z",
    )
    fused = fuse_add_rms_norm(made)
    assert (fused.count, fused.refused) == (1, [("second", "another norm has taken the sum")])
    assert ops(made) == ["AddRmsNorm", "RMSNormalization"]


def test_refuses_the_norm_of_a_norm_for_want_of_a_sum():
    made = graph(f"{ADD} [first] y = RMSNormalization(sum, w) [second] z = RMSNormalization(y, w)", outputs=f"{FP32} z")
    assert fuse_add_rms_norm(made).refused == [("second", "its input is not a sum")]


# Case 6.
def wide_norm(outputs: str, tail: str) -> gs.Graph:
    """A norm in fp32 of an fp16 sum, and what reads it."""
    return graph(
        f"{WIDE_W} {ADD} {WIDEN} [norm] normed = RMSNormalization(wide, v) {tail}", inputs=FP16_IN, outputs=outputs
    )


def test_refuses_an_fp32_norm_that_is_not_cast_back():
    made = wide_norm(f"{FP32} y", "[neg] y = Neg(normed)")
    assert refusals(made) == [("norm", "the fp32 norm is not cast back")]


def test_refuses_an_fp32_norm_that_another_operator_casts_back():
    made = wide_norm(f"{FP16} y", "[narrow] y = CastLike(normed, x)")
    assert refusals(made) == [("norm", "the fp32 norm is not cast back")]


def test_refuses_an_fp32_norm_cast_to_a_third_type():
    made = wide_norm(f"{BF16} y", f"[narrow] y = Cast<to = {BFLOAT}>(normed)")
    assert refusals(made) == [("norm", "the fp32 norm is not cast back")]


def test_refuses_an_fp32_norm_that_others_read():
    made = wide_norm(f"{FP16} y, {FP32} z", f"[narrow] y = Cast<to = {HALF}>(normed) [neg] z = Neg(normed)")
    assert refusals(made) == [("norm", "the fp32 norm has 2 consumers")]


def test_refuses_an_fp32_norm_that_is_a_graph_output():
    made = wide_norm(f"{FP16} y, {FP32} normed", f"[narrow] y = Cast<to = {HALF}>(normed)")
    assert refusals(made) == [("norm", "the fp32 norm is a graph output")]


def test_refuses_a_cast_back_of_another_domain():
    made = wide_norm(f"{FP16} y", "[narrow] y = other.Cast(normed)")
    assert refusals(made) == [("norm", "the fp32 norm is not cast back")]


def test_refuses_an_fp16_norm_of_an_fp32_sum():
    made = graph(f"""[half_w] v = Cast<to = {HALF}>(w) {ADD} [narrow] half = Cast<to = {HALF}>(sum)
        [norm] normed = RMSNormalization(half, v) [back] y = Cast<to = {FLOAT}>(normed)""")
    assert refusals(made) == [("norm", "the sum is cast to float16 before the norm")]


def test_refuses_a_norm_that_gives_another_type_than_it_takes():
    # Typed by hand: shape inference gives a norm the type of its input.
    header = '<ir_version: 10, opset_import: ["": 23]>'
    types = f"<float[7] v, {FP16} sum>"
    nodes = f"{WIDE_W} {ADD} [norm] y = RMSNormalization(sum, v)"
    made = gs.import_onnx(onnx.parser.parse_model(f"{header} g ({FP16_IN}) => ({FP32} y) {types} {{ {nodes} }}"))
    assert refusals(made) == [("norm", "the norm changes the type")]


def test_leaves_a_graph_without_norms_as_it_is():
    made = graph("[add] y = Add(x, residual)", inputs=f"{FP32} x, {FP32} residual")
    before = gs.export_onnx(made).SerializeToString(deterministic=True)
    assert fuse_add_rms_norm(made).count == 0
    assert gs.export_onnx(made).SerializeToString(deterministic=True) == before


def test_leaves_a_graph_in_which_nothing_fuses_as_it_is():
    made = wide_norm(f"{FP32} y", "[neg] y = Neg(normed)")
    before = gs.export_onnx(made).SerializeToString(deterministic=True)
    fuse_add_rms_norm(made)
    assert gs.export_onnx(made).SerializeToString(deterministic=True) == before


@pytest.fixture(scope="module", params=[*FORMS, *SANDWICHES])
def both(request: pytest.FixtureRequest) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """A form as it is, and fused with bodies attached."""
    before = form_model(request.param)
    made = gs.import_onnx(before)
    assert fuse_add_rms_norm(made).count == 1
    after = gs.export_onnx(made, ir_version=10)
    assert attach_bodies(after, load_body) == {"AddRmsNorm": 1}
    return before, after


def test_the_fused_model_is_valid(both):
    onnx.checker.check_model(both[1], full_check=True)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 63), (1, 130)])
def test_numbers_stay(both, batch, tokens):
    element = onnx.helper.tensor_dtype_to_np_dtype(both[0].graph.input[0].type.tensor_type.elem_type)
    seed = np.random.default_rng(tokens)
    shapes = {"x": (batch, tokens, 7), "residual": (batch, tokens, 7), "w": (7,), "u": (7,)}
    shapes = {v.name: shapes[v.name] for v in both[0].graph.input}
    feeds = {n: seed.standard_normal(shape).astype(element) for n, shape in shapes.items()}
    names = [o.name for o in both[0].graph.output]
    expected, found = (dict(zip(names, session(m).run(names, feeds), strict=True)) for m in both)
    # Squares summed in another order and another root: fp32 epsilons, which may take fp16 to its next number,
    # and there once more where the product with the weight rounds.
    eps = float(np.finfo(element).eps) * (4 if element == np.float32 else 2)
    assert compare(expected["y"], found["y"]).excess(Tolerance(eps, eps, scaled=True)) <= 1
    if "sum" in names:
        assert compare(expected["sum"], found["sum"]).max_abs == 0


def session(made: onnx.ModelProto) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
