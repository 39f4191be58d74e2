"""lower_whole_attention: what it rewrites, what it leaves, and that the numbers stay."""

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import onnxruntime
import pytest

from llmexport.export.graph_file import load_body
from llmexport.graphs.bodies import attach_bodies
from llmexport.graphs.lower_whole_attention import lower_whole_attention
from llmexport.plugins.spec import DOMAIN
from llmexport.validate.compare import compare

# Four heads of 12.
INPUTS = (
    "float[B,N,48] q, float[B,N,48] k, float[B,N,48] v, float[B,N,6] cos, float[B,N,6] sin, int64[N] segments, "
    "bool[B,1,N,N] told"
)
HELD = "<int64[4] four = {0, 0, 4, 12}, int64[3] flat = {0, 0, 48}, int64[1] one = {1}, int64[1] none = {0}>"
SPLIT = "[q4] q_heads = Reshape(q, four) [k4] k_heads = Reshape(k, four) [v4] v_heads = Reshape(v, four)"
TURN = """[qt] qt = Transpose<perm = [0, 2, 1, 3]>(q_heads) [kt] kt = Transpose<perm = [0, 2, 1, 3]>(k_heads)
  [vt] vt = Transpose<perm = [0, 2, 1, 3]>(v_heads)"""
ATTEND = "[attention] a = Attention<scale = 0.3>(qt, kt, vt)"
BACK = "[at] back = Transpose<perm = [0, 2, 1, 3]>(a) [flat] y = Reshape(back, flat)"
PLAIN = f"{SPLIT} {TURN} {ATTEND} {BACK}"
TURNS = "llmexport.Rope<interleaved = 0>"
ROPE = f"[qr] qr = {TURNS}(qt, cos, sin) [kr] kr = {TURNS}(kt, cos, sin)"
TURNED = PLAIN.replace("[attention]", f"{ROPE} [attention]").replace("(qt, kt, vt)", "(qr, kr, vt)")
MASK = "[s] column = Unsqueeze(segments, one) [e] same = Equal(column, segments) [m] mask = Unsqueeze(same, none)"
MASKED = TURNED.replace("[attention]", f"{MASK} [attention]").replace("kr, vt)", "kr, vt, mask)")
FORMS = {
    "plain": PLAIN,
    "default scale": PLAIN.replace("<scale = 0.3>", ""),
    "turned": TURNED,
    "pairs": TURNED.replace("= 0>", "= 1>"),
    "segments": MASKED,
    "segments, the other way": MASKED.replace("Equal(column, segments)", "Equal(segments, column)"),
    "q turned back": PLAIN.replace("[attention]", "[s] qs = Neg(qt) [attention]").replace("(qt, kt", "(qs, kt"),
}
SEGMENTS = {
    "one": [3, 3, 3, 3, 3],
    "two": [0, 0, 1, 1, 1],
    "the last its own": [0, 0, 0, 0, 7],
    "downwards": [5, 5, 2, 2, 0],
    "alone": [4],
    "one in two": [0, 1, 0],
    "two by turns": [4, 2, 4, 2, 4],
    "the end with the middle": [0, 1, 1, 2, 1],
}
MIXED = ("one in two", "two by turns", "the end with the middle")  # which are attended under the mask


def model(nodes: str, outputs: str = "") -> onnx.ModelProto:
    header = f'<ir_version: 10, opset_import: ["": 23, "{DOMAIN}": 1]>'
    made = onnx.parser.parse_model(f"{header} g ({INPUTS}) => (float[B,N,48] y{outputs}) {HELD} {{ {nodes} }}")
    for name in ("qr", "kr"):
        # Rope is ours, and onnx infers no shape behind it.
        made.graph.value_info.append(onnx.helper.make_tensor_value_info(name, 1, ["B", 4, "N", 12]))
    return onnx.shape_inference.infer_shapes(made)


def run(made: onnx.ModelProto, segments: list[int], *more: str) -> list[np.ndarray]:
    attach_bodies(made, load_body)
    rng, sizes = np.random.default_rng(0), {"B": 2, "N": len(segments)}
    feed = {}
    for i in made.graph.input:
        kind = i.type.tensor_type
        shape = [d.dim_value or sizes[d.dim_param] for d in kind.shape.dim]
        feed[i.name] = rng.standard_normal(shape).astype(np.float32)
    feed |= {"segments": np.array(segments), "told": rng.random((2, 1, len(segments), len(segments))) < 0.8}
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    names = {i.name for i in session.get_inputs()}
    return session.run(["y", *more], {n: a for n, a in feed.items() if n in names})


@pytest.mark.parametrize("form", FORMS)
def test_rows_go_in_and_come_out_and_the_numbers_stay(form):
    graph = gs.import_onnx(model(FORMS[form]))
    fused = lower_whole_attention(graph)
    assert (fused.count, fused.refused) == (1, [])
    ops = [n.op for n in graph.nodes]
    assert not {"Attention", "Rope"} & {*ops}
    assert ops.count("MultiHeadAttention") == (0 if "segments" in form else 1)
    assert ops.count("Transpose") == (2 if "back" in form else 0)
    for segments in SEGMENTS.values():
        [expected] = run(model(FORMS[form]), segments)
        [found] = run(gs.export_onnx(graph), segments)
        assert compare(expected, found).max_abs <= 2e-6


def test_segments_are_attended_to_one_by_one_where_their_tokens_follow_each_other():
    graph = gs.import_onnx(model(MASKED))
    lower_whole_attention(graph)
    [chosen] = [n for n in graph.nodes if n.op == "If"]
    said = {name: [n.op for n in branch.nodes] for name, branch in chosen.attrs.items()}
    assert said == {"then_branch": ["Slice", "Loop"], "else_branch": ["Attention"]}
    [loop] = [n for n in chosen.attrs["then_branch"].nodes if n.op == "Loop"]
    graph.outputs += [chosen.inputs[0], loop.inputs[0]]
    names, made = [v.name for v in graph.outputs[1:]], gs.export_onnx(graph)
    for name, segments in SEGMENTS.items():
        _, apart, count = run(made, segments, *names)
        assert apart == (name not in MIXED)
        assert not apart or count == len({*segments})


def test_layers_of_one_mask_ask_once():
    again = MASKED.split(MASK)[1] if MASKED.startswith(MASK) else MASKED.replace(MASK, "")
    for name in ("q_heads", "k_heads", "v_heads", "qt", "kt", "vt", "qr", "kr", "back"):
        again = again.replace(name, f"{name}2")
    again = (
        again.replace("a = Att", "a2 = Att").replace("(a)", "(a2)").replace("y = R", "y2 = R").replace("[", "[again_")
    )
    again = again.replace("perm = [again_", "perm = [")
    made = model(MASKED + again, ", float[B,N,48] y2")
    for name in ("qr2", "kr2"):
        made.graph.value_info.append(onnx.helper.make_tensor_value_info(name, 1, ["B", 4, "N", 12]))
    graph = gs.import_onnx(made)
    assert lower_whole_attention(graph).count == 2
    ops = [n.op for n in graph.nodes]
    assert (ops.count("If"), ops.count("ArgMax")) == (2, 1)


# What stands in the place of what in a legal graph.
HIDES = "its mask may hide something of one segment"
REFUSED = {
    f"{HIDES}: told": {"kr, vt, mask)": "kr, vt, told)", MASK: ""},
    f"{HIDES}: of others": {
        "Equal(column, segments)": "Equal(column, others)",
        "[s]": "[o] others = Neg(segments) [s]",
    },
    f"{HIDES}: those before": {"Equal(column, segments)": "LessOrEqual(column, segments)"},
    f"{HIDES}: turned back": {"[m]": "[n] other = Not(same) [m]", "Unsqueeze(same, none)": "Unsqueeze(other, none)"},
    "its scores are capped, masked or read: capped": {"<scale = 0.3>": "<scale = 0.3, softcap = 2.0>"},
    "its scores are capped, masked or read: masked": {"<scale = 0.3>": "<scale = 0.3, is_causal = 1>"},
    "its values are turned by Rope": {
        "[attention]": f"[vr] vr = {TURNS}(vt, cos, sin) [attention]",
        ", vt,": ", vr,",
    },
    "what is attended has 2 consumers": {"[at]": "[more] z = Identity(a) [at]"},
    "it has fewer heads of keys than of queries": {
        "Reshape(k, four)": "Reshape(k, two)",
        "Reshape(v, four)": "Reshape(v, two)",
        "int64[1] one": "int64[4] two = {0, 0, 2, 24}, int64[1] one",
    },
}


@pytest.mark.parametrize("why", REFUSED)
def test_another_form_is_left_as_it_is(why, monkeypatch):
    nodes, held = MASKED, HELD
    for old, new in REFUSED[why].items():
        assert old in nodes + held
        nodes, held = nodes.replace(old, new), held.replace(old, new)
    monkeypatch.setattr(f"{__name__}.HELD", held)
    graph = gs.import_onnx(model(nodes, ", float[B,4,N,12] z" * ("z = " in nodes)))
    before = [n.op for n in graph.nodes]
    fused = lower_whole_attention(graph)
    assert (fused.count, fused.refused) == (0, [("attention", why.partition(":")[0])])
    assert [n.op for n in graph.nodes] == before


def test_fp16_is_left_as_no_cpu_has_it():
    made = model(PLAIN)
    for value in (*made.graph.input, *made.graph.value_info, *made.graph.output):
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    fused = lower_whole_attention(gs.import_onnx(made))
    assert (fused.count, fused.refused) == (0, [("attention", "it is of float16, not of float32")])


@pytest.mark.parametrize("keys", ["Concat<axis = 2>(pk, kt)", "Identity(kt)"])
def test_keys_that_are_not_the_steps_own_are_no_candidate(keys):
    nodes = PLAIN.replace("[attention]", f"[j] all_k = {keys} [attention]").replace("qt, kt, vt", "qt, all_k, vt")
    made = model(nodes.replace("pk, kt", "kt, kt"))
    fused = lower_whole_attention(gs.import_onnx(made))
    assert (fused.count, fused.refused) == (0, [])
