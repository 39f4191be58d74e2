"""fuse_qk_norm_rope: what it fuses, what it refuses, and that the numbers stay."""

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import onnxruntime
import pytest

from llmexport.export.graph_file import load_body
from llmexport.graphs.bodies import attach_bodies
from llmexport.graphs.fuse_qk_norm_rope import fuse_qk_norm_rope
from llmexport.graphs.fusion import Fused
from llmexport.plugins.spec import DOMAIN
from llmexport.validate.compare import compare
from llmexport.validate.tolerance import Tolerance

# Four heads of 8 of q, two of k and v; six dimensions of a head turn. T is float or float16.
INPUTS = (
    "T[B,N,4,8] q, T[B,N,2,8] k, T[B,N,2,8] v, T[B,N,3] cos, T[B,N,3] sin, T[8] qw, T[8] kw, "
    "T[B,N,4,16] both, T[B,2,16,8] pk, T[B,2,16,8] pv, int64[B] at, bool[B,1,N,16] mask, float[B] heat"
)
FRONT = "Transpose<perm = [0, 2, 1, 3]>"
ROPE = "llmexport.Rope<interleaved = 0>"
HEADS = f"[qt] qt = {FRONT}({{q}}) [kt] kt = {FRONT}({{k}}) [vt] vt = {FRONT}(v)"
TURN = f"[q_rope] qr = {ROPE}(qt, cos, sin) [k_rope] kr = {ROPE}(kt, cos, sin)"
SCATTER = "[ks] keys = TensorScatter<axis = -2>(pk, {k}, at) [vs] values = TensorScatter<axis = -2>(pv, vt, at)"
ATTEND = "[attention] y = Attention<scale = 0.3>({q}, keys, values, mask)"


def normed(x: str, y: str, weight: str, epsilon: float = 1e-6) -> str:
    """A norm that rounds before its weight."""
    return f"[{y}_norm] {y} = RMSNormalization<epsilon = {epsilon}>({x}, {weight})"


def widened(x: str, y: str, weight: str) -> str:
    """A norm of 1 + w in fp32, cast back to fp16."""
    return (
        f"[{y}_a] {y}_wide = Cast<to = 1>({x}) [{y}_b] {y}_w = Cast<to = 1>({weight}) [{y}_c] {y}_s = Add({y}_w, one) "
        f"[{y}_norm] {y}_n = RMSNormalization<epsilon = 1e-6>({y}_wide, {y}_s) [{y}_d] {y} = Cast<to = 10>({y}_n)"
    )


def layer(q: str = "q", k: str = "k", before: str = "", after: str = "", query: str = "qr", key: str = "kr") -> str:
    """A layer whose norms make q and k of what is projected, or query and key of what is turned."""
    return f"{before} {HEADS.format(q=q, k=k)} {TURN} {after} {SCATTER.format(k=key)} {ATTEND.format(q=query)}"


PLAIN = layer()
FIRST = layer("qn", "kn", normed("q", "qn", "qw") + normed("k", "kn", "kw"))
LAST = layer(after=normed("qr", "qn", "qw") + normed("kr", "kn", "kw"), query="qn", key="kn")
WIDE = layer("qn", "kn", widened("q", "qn", "qw") + widened("k", "kn", "kw"))
SCALED = layer(after="[up] qf = Cast<to = 1>(qr) [heat] qm = Mul(qf, heat4) [down] qs = Cast<to = 10>(qm)", query="qs")
GROWN = PLAIN.replace("TensorScatter<axis = -2>(pk, kr, at)", "Concat<axis = 2>(pk, kr)")
GROWN = GROWN.replace("TensorScatter<axis = -2>(pv, vt, at)", "Concat<axis = 2>(pv, vt)").replace("mask)", "longer)")
UNCACHED = f"{HEADS.format(q='q', k='k')} {TURN} [attention] y = Attention<scale = 0.3>(qr, kr, vt)"
CUT = "[cut] qh, gate = Split<axis = -1, num_outputs = 2>(both)"
GATE = "[gate] g = Sigmoid(gate)"
GATED = f"{layer('qn', 'kn', CUT + normed('qh', 'qn', 'qw') + normed('k', 'kn', 'kw'))} {GATE}"
GATE_OUT = ", float[B,N,4,8] g"
NO_NORM = {"epsilon": 0.0, "weight_offset": 0.0, "round_before_weight": 0, "interleaved": 0, "norm_first": 1}
EPSILON = float(np.float32(1e-6))
NORM = {**NO_NORM, "epsilon": EPSILON, "round_before_weight": 1}
SHIFTED = {**NORM, "round_before_weight": 0, "weight_offset": 1.0}
# By form: its nodes, its float type, the attributes and how many weights the op has.
FORMS = {
    "plain": (PLAIN, "float", NO_NORM, 0),
    "interleaved": (PLAIN.replace("interleaved = 0", "interleaved = 1"), "float", {**NO_NORM, "interleaved": 1}, 0),
    "norm before": (FIRST, "float", NORM, 2),
    "norm before, fp16": (FIRST, "float16", NORM, 2),
    "norm before in fp32": (WIDE, "float16", SHIFTED, 2),
    "norm after": (LAST, "float", {**NORM, "norm_first": 0}, 2),
    "queries scaled": (SCALED, "float16", NO_NORM, 0),
    "grown cache": (GROWN, "float", NO_NORM, 0),
    "no cache": (UNCACHED, "float", NO_NORM, 0),
}


def model(nodes: str, kind: str = "float", more: str = "", both: str = "4,16") -> onnx.ModelProto:
    """more: outputs beside the attention's; both: heads of q and their size where a gate lies behind them."""
    held = "<float one = {1}>"
    heat = "<int64[3] axes = {1, 2, 3}>"
    if "heat4" in nodes:
        held, nodes = heat, f"[lift] heat4 = Unsqueeze(heat, axes) {nodes}"
    inputs = (
        INPUTS.replace("4,16] both", f"{both}] both")
        .replace("T[", f"{kind}[")
        .replace("bool[B,1,N,16] mask", "bool[B,1,N,16] mask, bool[B,1,N,S] longer")
    )
    header = f'<ir_version: 10, opset_import: ["": 24, "{DOMAIN}": 1]>'
    made = onnx.parser.parse_model(f"{header} g ({inputs}) => ({kind}[B,4,N,8] y{more}) {held} {{ {nodes} }}")
    # Rope is ours, and onnx infers no shape behind it.
    element = {"float": 1, "float16": 10}[kind]
    for value, heads in (("qr", 4), ("kr", 2)):
        made.graph.value_info.append(onnx.helper.make_tensor_value_info(value, element, ["B", heads, "N", 8]))
    return onnx.shape_inference.infer_shapes(made)


def graph(nodes: str, kind: str = "float", more: str = "", both: str = "4,16") -> gs.Graph:
    return gs.import_onnx(model(nodes, kind, more, both))


def ops(made: gs.Graph) -> list[str]:
    return [n.op for n in made.nodes]


@pytest.mark.parametrize("form", FORMS)
def test_one_op_stands_for_norms_rotation_and_heads(form):
    nodes, kind, attributes, weights = FORMS[form]
    made = graph(nodes, kind)
    assert fuse_qk_norm_rope(made) == Fused(1, [])
    assert not {"Rope", "Transpose", "RMSNormalization"} & {*ops(made)}
    [node] = [n for n in made.nodes if n.op == "QkNormRope"]
    assert (node.name, node.domain, node.attrs) == ("q_rope/QkNormRope", DOMAIN, attributes)
    assert [v.name for v in node.inputs] == ["q", "k", "v", "cos", "sin", "qw", "kw"][: 5 + weights]
    last = form == "norm after"
    assert [v.name for v in node.outputs] == ["qn" if last else "qr", "kn" if last else "kr", "vt"]


@pytest.mark.parametrize("form", FORMS)
def test_numbers_stay(form):
    nodes, kind, *_ = FORMS[form]
    before, made = model(nodes, kind), graph(nodes, kind)
    fuse_qk_norm_rope(made)
    after = gs.export_onnx(made, ir_version=10)
    for one in (before, after):
        attach_bodies(one, load_body)
    onnx.checker.check_model(after)
    expected, found = run(before)[0], run(after)[0]
    # fp32 alike; ONNX Runtime keeps fp16 in fp32 between other nodes: a rounding of each norm and rotation.
    unit = 2.0**-20 if kind == "float" else 2.0**-8
    assert compare(expected.astype(float), found.astype(float)).excess(Tolerance(unit, unit, scaled=True)) <= 1


def test_q_is_read_as_it_was_parted_where_the_size_of_both_is_unknown():
    made = graph(GATED, more=GATE_OUT)
    next(v for v in made.inputs if v.name == "both").shape = None
    assert fuse_qk_norm_rope(made).count == 1
    assert "Split" in ops(made)


def run(made: onnx.ModelProto) -> list[np.ndarray]:
    rng, (batch, tokens) = np.random.default_rng(0), (2, 3)
    sizes = {"B": batch, "N": tokens, "S": 16 + tokens}
    element = {1: np.float32, 10: np.float16, 7: np.int64, 9: bool}
    feeds = {}
    for value in made.graph.input:
        kind = value.type.tensor_type
        shape = [d.dim_value or sizes[d.dim_param] for d in kind.shape.dim]
        drawn = rng.standard_normal(shape) + 0.5
        feeds[value.name] = (drawn > 0 if kind.elem_type == 9 else drawn.clip(0)).astype(element[kind.elem_type])
        if kind.elem_type in (1, 10):
            feeds[value.name] = drawn.astype(element[kind.elem_type])
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


@pytest.mark.parametrize("turned_alone", [False, True])
def test_q_is_read_beside_its_gate(turned_alone):
    nodes = f"{layer('qh', before=CUT)} {GATE}" if turned_alone else GATED
    made, before = graph(nodes, more=GATE_OUT), model(nodes, more=GATE_OUT)
    assert fuse_qk_norm_rope(made) == Fused(1, [])
    assert "Split" not in ops(made)
    [node] = [n for n in made.nodes if n.op == "QkNormRope"]
    [cut] = [n for n in made.nodes if n.op == "Slice"]
    assert (node.inputs[0].name, cut.name, [v.name for v in cut.outputs]) == ("both", "cut", ["gate"])
    after = gs.export_onnx(made, ir_version=10)
    for one in (before, after):
        attach_bodies(one, load_body)
    onnx.checker.check_model(after)
    unit = 2.0**-20
    for expected, found in zip(run(before), run(after), strict=True):
        assert compare(expected.astype(float), found.astype(float)).excess(Tolerance(unit, unit, scaled=True)) <= 1


# By why q is no part that is read beside another: what stands in the place of what, heads and size of both, outputs.
APART = {
    "others read q": ({"[gate]": "[neg] z = Neg(qh) [gate]"}, "4,16", ", float[B,N,4,8] z"),
    "q is an output": ({}, "4,16", ", float[B,N,4,8] qh"),
    "q is the second part": ({"qh, gate": "gate, qh"}, "4,16", ""),
    "the heads are split": ({"axis = -1": "axis = 2"}, "8,8", ""),
    "there are three parts": ({"qh, gate =": "qh, gate, third =", "num_outputs = 2": "num_outputs = 3"}, "4,24", ""),
}


@pytest.mark.parametrize("why", APART)
def test_q_is_read_as_it_was_parted_where(why):
    changed, both, more = APART[why]
    nodes = GATED
    for old, new in changed.items():
        assert old in nodes
        nodes = nodes.replace(old, new)
    made = graph(nodes, more=GATE_OUT + more, both=both)
    assert fuse_qk_norm_rope(made) == Fused(1, [])
    [node] = [n for n in made.nodes if n.op == "QkNormRope"]
    assert (node.inputs[0].name, "Split" in ops(made), "Slice" in ops(made)) == ("qh", True, False)


def test_sinks_attention_is_one_too():
    made = graph(
        PLAIN.replace("Attention<scale = 0.3>(qr, keys, values, mask)", "llmexport.SinkAttention(qr, keys, values)")
    )
    assert fuse_qk_norm_rope(made).count == 1


def test_a_cached_value_that_is_an_output_too_stays_one():
    made = graph(GROWN.replace("mask)", "longer)"), more=", float[B,2,S,8] keys, float[B,2,N,8] vt")
    assert fuse_qk_norm_rope(made).count == 1
    assert [o.name for o in made.outputs] == ["y", "keys", "vt"]


def test_norms_of_another_kind_stay_where_they_are():
    """One of q alone; two that differ; one over other dimensions than a head's."""
    alone = layer("qn", "k", normed("q", "qn", "qw"))
    apart = layer("qn", "kn", normed("q", "qn", "qw") + normed("k", "kn", "kw", 1e-5))
    for nodes, left in ((alone, 1), (apart, 2)):
        made = graph(nodes)
        assert fuse_qk_norm_rope(made).count == 1
        assert ops(made).count("RMSNormalization") == left
        [node] = [n for n in made.nodes if n.op == "QkNormRope"]
        assert (node.inputs[0].name, len(node.inputs), node.attrs) == ("qn", 5, NO_NORM)


def test_a_norm_that_others_read_stays_for_them():
    made = graph(FIRST + " [more] z = Neg(qn)", more=", float[B,N,4,8] z")
    assert fuse_qk_norm_rope(made).count == 1
    assert (ops(made).count("RMSNormalization"), ops(made).count("Neg")) == (1, 1)


# By the reason, what stands in the place of what in a legal graph.
REFUSED = {
    # Case 1.
    "q is not turned by Rope": {
        "[attention]": "[neg] n = Neg(qr) [attention]",
        "(qr, keys": "(n, keys",
    },
    "k is not turned by Rope": {"[ks]": "[neg] n = Neg(kr) [ks]", "(pk, kr": "(pk, n"},
    "q and k are turned by other angles or in another way": {"(kt, cos, sin)": "(kt, sin, cos)"},
    # Case 2.
    "q is not [B, T, heads, D] with its heads turned to the front": {
        "[q_rope]": "[neg] n = Neg(qt) [q_rope]",
        "(qt, cos": "(n, cos",
    },
    "v is not [B, T, heads, D] with its heads turned to the front": {
        "[vs]": "[neg] n = Neg(vt) [vs]",
        "(pv, vt": "(pv, n",
    },
    # Case 4.
    "query, key or value is read before all of q, k and v are made": {
        f"[q_rope] qr = {ROPE}(qt, cos, sin)": "",
        "[kt]": f"[q_rope] qr = {ROPE}(qt, cos, sin) [kt]",
        "[vt]": "[early] e = Neg(qr) [late] v2 = Neg(v) [vt]",
        f"{FRONT}(v)": f"{FRONT}(v2)",
    },
}


@pytest.mark.parametrize("why", REFUSED)
def test_another_form_is_left_as_it_is(why):
    nodes = PLAIN
    for old, new in REFUSED[why].items():
        assert old in nodes
        nodes = nodes.replace(old, new)
    made = graph(nodes, more=", float[B,4,N,8] e" * ("e = Neg" in nodes))
    before = ops(made)
    assert fuse_qk_norm_rope(made) == Fused(0, [("attention", why)])
    assert ops(made) == before


def test_refuses_another_interleaving():
    made = graph(PLAIN.replace(f"kr = {ROPE}", f"kr = {ROPE.replace('0', '1')}"))
    assert fuse_qk_norm_rope(made).refused == [("attention", "q and k are turned by other angles or in another way")]


# Case 3.
def test_refuses_heads_of_an_unknown_number():
    made = graph(PLAIN)
    next(v for v in made.inputs if v.name == "k").shape = ["B", "N", "G", 8]
    assert fuse_qk_norm_rope(made).refused == [("attention", "its heads are of a number or size that is not known")]


def test_refuses_values_of_another_size():
    made = graph(PLAIN)
    next(v for v in made.inputs if v.name == "v").shape = ["B", "N", 2, 16]
    assert fuse_qk_norm_rope(made).refused == [("attention", "its heads of q, k and v are 4 of 8, 2 of 8, 2 of 16")]


def test_refuses_angles_of_another_type():
    made = graph(PLAIN)
    next(v for v in made.inputs if v.name == "cos").dtype = np.dtype(np.float16)
    assert fuse_qk_norm_rope(made).refused == [("attention", "q, k, v and the angles are not of one float type")]


def test_a_second_run_finds_no_more():
    made = graph(FIRST)
    fuse_qk_norm_rope(made)
    assert fuse_qk_norm_rope(made) == Fused(0, [("attention", "q is not turned by Rope")])
