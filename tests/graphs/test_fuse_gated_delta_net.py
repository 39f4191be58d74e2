"""fuse_gated_delta_net: what it fuses, what it refuses, and that the numbers stay."""

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import onnxruntime
import pytest

from llmexport.export.graph_file import load_body
from llmexport.graphs.bodies import attach_bodies
from llmexport.graphs.fuse_gated_delta_net import fuse_gated_delta_net
from llmexport.graphs.fusion import Fused
from llmexport.plugins.spec import DOMAIN
from llmexport.validate.compare import compare
from llmexport.validate.tolerance import Tolerance

# One head of 16 of q and k, two of 16 of v. T is float or float16.
INPUTS = (
    "T[B,N,64] mixed, T[64,1,4] taps, T[B,3,64] conv_state, int32[B] end, "
    "T[B,N,2] a, T[B,N,2] b, T[B,N] present, T[2] a_log, T[2] dt_bias, T[B,N,2,16] z, T[16] w, "
    "float[B,2,16,16] state"
)
CONVOLUTION = '[conv] convolved, after_conv = llmexport.CausalConv1d<activation = "silu">(mixed, taps, conv_state, end)'
PARTS = (
    "[split] qs, ks, vs = Split<axis = 2>(convolved, parts) [q_heads] q = Reshape(qs, key_heads) "
    "[k_heads] k = Reshape(ks, key_heads) [v_heads] v = Reshape(vs, value_heads)"
)
SHOWN = "[lift] shown = Unsqueeze(present, last)"
STEP = "[ac] aw = Cast<to = 1>(a) [dc] dw = Cast<to = 1>(dt_bias) [step] x = Add(aw, dw)"
SOFT = "[soft] sc = Softplus(x) [above] over = Greater(x, twenty) [choice] s = Where(over, x, sc)"
DECAY = (
    f"{STEP} {SOFT} [lc] lw = Cast<to = 1>(a_log) [rate] e = Exp(lw) [down] en = Neg(e) [decay] ge = Mul(en, s) "
    "[pc] pw = Cast<to = 1>(shown) [masked] g = Mul(ge, pw)"
)
STRENGTH = "[sig] bs = Sigmoid(b) [bm] beta = Mul(bs, shown)"
RULE = "[rule] y, after = llmexport.GatedDeltaRule<scale = 0.25, l2_norm = 1>(q, k, v, g, beta, state)"
NORM = (
    '[norm] out = llmexport.GatedRmsNorm<epsilon = 0.000001, activation = "silu", round_before_weight = 1>(y, z, w) '
    "[flat] gated = Identity(out)"
)
NET = f"{CONVOLUTION} {PARTS} {SHOWN} {DECAY} {STRENGTH} {RULE} {NORM}"
HELD = (
    "<int64[3] parts = {16, 16, 32}, int64[4] key_heads = {0, 0, 1, 16}, int64[4] value_heads = {0, 0, 2, 16}, "
    "int64[1] last = {-1}, float twenty = {20}>"
)
UNCAST = NET
for cast, narrow in (("ac", "a"), ("dc", "dt_bias"), ("lc", "a_log"), ("pc", "shown")):
    wide = {"a": "aw", "dt_bias": "dw", "a_log": "lw", "shown": "pw"}[narrow]
    UNCAST = UNCAST.replace(f"[{cast}] {wide} = Cast<to = 1>({narrow})", "").replace(f"{wide})", f"{narrow})")
    UNCAST = UNCAST.replace(f"({wide},", f"({narrow},")
FORMS = {
    "fp16": (NET, "float16"),
    "fp32": (UNCAST, "float"),
    "one softplus": (NET.replace(SOFT, "[soft] s = Softplus(x)"), "float16"),
    "axis from the end": (NET.replace("axis = 2", "axis = -1"), "float16"),
    "present first": (NET.replace("Mul(bs, shown)", "Mul(shown, bs)"), "float16"),
}


def model(nodes: str, kind: str = "float16", more: str = "", held: str = HELD) -> onnx.ModelProto:
    """more: outputs beside the net's; held: constants."""
    header = f'<ir_version: 10, opset_import: ["": 24, "{DOMAIN}": 1]>'
    outputs = f"{kind}[B,N,2,16] gated, {kind}[B,3,64] after_conv, float[B,2,16,16] after{more}"
    inputs = INPUTS.replace("T[", f"{kind}[")
    made = onnx.parser.parse_model(f"{header} g ({inputs}) => ({outputs}) {held} {{ {nodes} }}")
    # The convolution, the rule and the norm are ours, and onnx infers no shape behind them.
    element = {"float": 1, "float16": 10}[kind]
    named = {v.name for v in made.graph.output}
    shapes = {"y": ["B", "N", 2, 16], "out": ["B", "N", 2, 16], "convolved": ["B", "N", 64]}
    for name in shapes.keys() - named:
        made.graph.value_info.append(onnx.helper.make_tensor_value_info(name, element, shapes[name]))
    return onnx.shape_inference.infer_shapes(made)


def graph(nodes: str, kind: str = "float16", more: str = "", held: str = HELD) -> gs.Graph:
    return gs.import_onnx(model(nodes, kind, more, held))


@pytest.mark.parametrize("form", FORMS)
def test_one_op_stands_for_convolution_gates_rule_and_norm(form):
    made = graph(*FORMS[form])
    assert fuse_gated_delta_net(made) == Fused(1, [])
    assert [n.op for n in made.nodes] == ["GatedDeltaNet", "Identity"]
    node = made.nodes[0]
    assert (node.name, node.domain) == ("norm/GatedDeltaNet", DOMAIN)
    expected = ["mixed", "taps", "conv_state", "end", "a", "b", "present", "a_log", "dt_bias", "z", "w", "state"]
    assert [v.name for v in node.inputs] == expected
    assert [v.name for v in node.outputs] == ["out", "after_conv", "after"]
    epsilon = float(np.float32(1e-6))
    attributes = {"scale": 0.25, "l2_norm": 1, "epsilon": epsilon, "activation": "silu", "round_before_weight": 1}
    assert node.attrs == attributes


@pytest.mark.parametrize("form", FORMS)
def test_numbers_stay(form):
    nodes, kind = FORMS[form]
    before, made = model(nodes, kind), graph(nodes, kind)
    fuse_gated_delta_net(made)
    after = gs.export_onnx(made, ir_version=10)
    for one in (before, after):
        attach_bodies(one, load_body)
    onnx.checker.check_model(after)
    # fp32 alike; ONNX Runtime keeps fp16 in fp32 between other nodes: a rounding of beta, y, the norm and its product.
    unit = 2.0**-20 if kind == "float" else 2.0**-8
    for expected, found in zip(run(before), run(after), strict=True):
        assert compare(expected.astype(float), found.astype(float)).excess(Tolerance(unit, unit, scaled=True)) <= 1


def run(made: onnx.ModelProto) -> list[np.ndarray]:
    rng, sizes = np.random.default_rng(0), {"B": 2, "N": 3}
    element = {1: np.float32, 6: np.int32, 10: np.float16}
    feeds = {}
    for value in made.graph.input:
        kind = value.type.tensor_type
        drawn = rng.standard_normal([d.dim_value or sizes[d.dim_param] for d in kind.shape.dim])
        feeds[value.name] = (drawn > 0 if value.name == "present" else drawn).astype(element[kind.elem_type])
    feeds["end"] = np.array([3, 2], np.int32)
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["gated", "after_conv", "after"], feeds)


def test_what_others_read_stays_for_them():
    made = graph(NET + " [more] n = Neg(beta)", more=", float16[B,N,2] n")
    assert fuse_gated_delta_net(made).count == 1
    assert [n.op for n in made.nodes].count("Sigmoid") == 1


DECAYS = "g is not -exp(a_log) * softplus(a + dt_bias) * present"
NO_CONVOLUTION = "q, k and v come of no CausalConv1d with SiLU and no bias"
STRENGTHS = "beta is not sigmoid(b) * present"
# What stands in the place of what in a legal graph, and the reason, by case.
REFUSED = [
    ({"Reshape(ks, key_heads)": "Reshape(qs, key_heads)"}, "q, k and v are not the parts of one Split"),
    ({"[q_heads] q = Reshape(qs": "[neg] qn = Neg(qs) [q_heads] q = Reshape(qn"}, "q, k and v are not the parts of"),
    ({"[rule]": "[neg] kn = Neg(k) [rule]", "(q, k, v": "(q, kn, v"}, "k is no reshaped part of one tensor"),
    ({"[down] en = Neg(e)": "[down] en = Abs(e)"}, DECAYS),
    ({"Exp(lw)": "Sqrt(lw)"}, DECAYS),
    ({"Softplus(x)": "Softplus(aw)"}, DECAYS),
    ({"Greater(x, twenty)": "Greater(aw, twenty)"}, DECAYS),
    ({"Where(over, x, sc)": "Where(over, aw, sc)"}, DECAYS),
    ({"float twenty = {20}": "float twenty = {2}"}, DECAYS),
    ({"[masked] g = Mul(ge, pw)": "[masked] g = Div(ge, pw)"}, DECAYS),
    ({"Add(aw, dw)": "Sub(aw, dw)"}, DECAYS),
    ({"Sigmoid(b)": "Tanh(b)"}, STRENGTHS),
    ({"[bm]": "[other] s2 = Abs(shown) [bm]", "Mul(bs, shown)": "Mul(bs, s2)"}, STRENGTHS),
    ({"Unsqueeze(present, last)": "Reshape(present, one_more)"}, "present has not got its last axis by an Unsqueeze"),
    ({"[norm]": "[neg] yn = Neg(y) [norm]", "(y, z, w)": "(yn, z, w)"}, "what the rule gives goes to Neg, not to a g"),
    ({"(y, z, w)": "(z, y, w)"}, "what the rule gives goes to GatedRmsNorm, not to a gated norm"),
    ({"[norm]": "[early] n = Neg(after) [norm]"}, "after is read before the norm"),
    ({"[norm]": "[early] n = Neg(after_conv) [norm]"}, "after_conv is read before the norm"),
    (
        {"Split<axis = 2>(convolved": "Split<axis = 2>(mixed"},
        "q, k and v come of no CausalConv1d with SiLU and no bias",
    ),
    ({'"silu">(mixed': '"none">(mixed'}, NO_CONVOLUTION),
    ({"conv_state, end)": "conv_state, end, bias)"}, NO_CONVOLUTION),
    ({"[flat]": "[more] n = Neg(convolved) [flat]"}, "others read what the convolution gives"),
    ({"[flat]": "[more] n = Neg(y) [flat]"}, "what the rule gives has 2 consumers"),
]


@pytest.mark.parametrize(("changes", "why"), REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_another_form_is_left_as_it_is(changes: dict[str, str], why: str):
    nodes, held = NET, HELD.replace(">", ", int64[3] one_more = {0, 0, 1}, float16[1] bias = {0}>")
    for old, new in changes.items():
        assert old in nodes + held
        nodes, held = nodes.replace(old, new), held.replace(old, new)
    more = {"n = Neg(after)": ", float[B,2,16,16] n", "n = Neg(y)": ", float16[B,N,2,16] n"}
    more |= {"n = Neg(after_conv)": ", float16[B,3,64] n", "n = Neg(convolved)": ", float16[B,N,64] n"}
    made = graph(nodes, more="".join(output for made, output in more.items() if f"] {made}" in nodes), held=held)
    before = [n.op for n in made.nodes]
    [(name, reason)] = fuse_gated_delta_net(made).refused
    assert (name, reason[: len(why)]) == ("rule", why)
    assert [n.op for n in made.nodes] == before


def test_refuses_a_result_of_the_rule_that_is_an_output():
    made = graph(NET, more=", float16[B,N,2,16] y")
    assert fuse_gated_delta_net(made).refused == [("rule", "what the rule gives is a graph output")]


def test_refuses_what_is_convolved_and_an_output():
    made = graph(NET, more=", float16[B,N,64] convolved")
    assert fuse_gated_delta_net(made).refused == [("rule", "others read what the convolution gives")]


def test_refuses_another_axis_of_the_split():
    made = graph(NET)
    next(n for n in made.nodes if n.op == "Split").attrs["axis"] = 1
    assert fuse_gated_delta_net(made).refused == [("rule", "the Split is not of the last of three axes")]


def test_refuses_heads_that_the_state_has_not():
    made = graph(NET)
    next(v for v in made.inputs if v.name == "state").shape = ["B", 2, 16, 8]
    assert fuse_gated_delta_net(made).refused == [("rule", "the heads of q, k and v are not those of the state")]


@pytest.mark.parametrize("name", ["b", "a_log", "dt_bias"])
def test_refuses_numbers_that_heads_share(name: str):
    made = graph(NET)
    value = next(v for v in made.inputs if v.name == name)
    value.shape = [*value.shape[:-1], 1]
    why = "a, b, a_log and dt_bias have not a number for each head of v"
    assert fuse_gated_delta_net(made).refused == [("rule", why)]


def test_refuses_a_gate_of_another_type():
    made = graph(NET)
    next(v for v in made.inputs if v.name == "z").dtype = np.dtype(np.float32)
    assert fuse_gated_delta_net(made).refused == [("rule", "its inputs are not of one float type")]


def test_a_second_run_finds_no_more():
    made = graph(NET)
    fuse_gated_delta_net(made)
    assert fuse_gated_delta_net(made) == Fused()
