"""lower_attention: what it rewrites, what it leaves, and that the numbers stay."""

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import onnxruntime
import pytest

from llmexport.export.graph_file import load_body
from llmexport.graphs.bodies import attach_bodies
from llmexport.graphs.lower_attention import lower_attention
from llmexport.plugins.spec import DOMAIN
from llmexport.validate.compare import compare

# Four heads of 8, two of keys and values.
INPUTS = (
    "float[B,T,32] q, float[B,T,16] k, float[B,T,16] v, float[B,1,T,S] mask, float[B,T,R] cos, float[B,T,R] sin, "
    "float[B,2,P,8] pk, float[B,2,P,8] pv"
)
SPLIT = """
  <int64[4] four = {0, 0, 4, 8}, int64[4] two = {0, 0, 2, 8}, int64[3] flat = {0, 0, 32}>
  [q4] q_heads = Reshape(q, four) [k4] k_heads = Reshape(k, two) [v4] v_heads = Reshape(v, two)
"""
TURN = """[qt] qt = Transpose<perm = [0, 2, 1, 3]>(q_heads) [kt] kt = Transpose<perm = [0, 2, 1, 3]>(k_heads)
  [vt] vt = Transpose<perm = [0, 2, 1, 3]>(v_heads)"""
JOIN = "[kj] all_k = Concat<axis = 2>(pk, {k}) [vj] all_v = Concat<axis = 2>(pv, vt)"
ATTEND = "[attention] a = Attention<scale = 0.3>({q}, all_k, all_v, mask)"
BACK = "[at] back = Transpose<perm = [0, 2, 1, 3]>(a) [flat] y = Reshape(back, flat)"
PLAIN = f"{TURN} {JOIN.format(k='kt')} {ATTEND.format(q='qt')} {BACK}"
TURNS = "llmexport.Rope<interleaved = {i}>"
ROPE = f"[qr] qr = {TURNS}(qt, cos, sin) [kr] kr = {TURNS}(kt, cos, sin)"
TURNED = f"{TURN} {ROPE} {JOIN.format(k='kr')} {ATTEND.format(q='qr')} {BACK}"
# The nodes, and how many numbers each head's angles are.
FORMS = {"plain": (PLAIN, 4), "half": (TURNED.format(i=0), 4), "pairs": (TURNED.format(i=1), 4)}
FORMS |= {"part of a head": (TURNED.format(i=0), 3), "normed heads": (PLAIN.replace("(q_heads)", "(q_normed)", 1), 4)}
BACK_AGAIN = "q turned back"
FORMS |= {BACK_AGAIN: (PLAIN.replace("[kj]", "[s] qs = Neg(qt) [kj]").replace("(qt, all_k", "(qs, all_k"), 4)}
NORM = "<float[8] w = {1, 2, 3, 4, 5, 6, 7, 8}> [norm] q_normed = RMSNormalization(q_heads, w)"


def model(nodes: str, angles: int = 4, outputs: str = "") -> onnx.ModelProto:
    header = f'<ir_version: 10, opset_import: ["": 23, "{DOMAIN}": 1]>'
    held, rest = SPLIT.strip().split(">", 1)
    if "q_normed" in nodes:
        own, norm = NORM.split(">", 1)
        held, rest = f"{held}, {own.removeprefix('<')}", rest + norm
    ends = "float[B,T,32] y, float[B,2,S,8] all_k, float[B,2,S,8] all_v" + outputs
    text = f"{header} g ({INPUTS.replace('R]', f'{angles}]')}) => ({ends}) {held}> {{ {rest} {nodes} }}"
    made = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))
    # Rope is ours, and onnx infers no shape behind it.
    for name in ("qr", "kr"):
        heads = 4 if name == "qr" else 2
        made.graph.value_info.append(onnx.helper.make_tensor_value_info(name, 1, ["B", heads, "T", 8]))
    return made


def run(made: onnx.ModelProto, angles: int) -> list[np.ndarray]:
    attach_bodies(made, load_body)
    rng, (batch, tokens, past) = np.random.default_rng(0), (2, 3, 5)
    sizes = {"B": batch, "T": tokens, "P": past, "S": past + tokens}
    shapes = {
        p.name: [d.dim_value or sizes[d.dim_param] for d in p.type.tensor_type.shape.dim] for p in made.graph.input
    }
    feed = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    names = {i.name for i in session.get_inputs()}
    return session.run(None, {n: a.astype(np.float32) for n, a in feed.items() if n in names})


@pytest.mark.parametrize("form", FORMS)
def test_rows_go_in_and_come_out_and_the_numbers_stay(form):
    nodes, angles = FORMS[form]
    graph = gs.import_onnx(model(nodes, angles))
    fused = lower_attention(graph)
    assert (fused.count, fused.refused) == (1, [])
    ops = [n.op for n in graph.nodes]
    assert not {"Concat", "Rope"} & {*ops}
    assert ops.count("Transpose") == (2 if form == BACK_AGAIN else 0)
    assert ops.count("RotaryEmbedding") == (2 if "Rope" in nodes else 0)
    [attention] = [n for n in graph.nodes if n.op == "Attention"]
    assert (attention.attrs["q_num_heads"], attention.attrs["kv_num_heads"]) == (4, 2)
    assert [v.name for v in attention.outputs] == ["y", "all_k", "all_v"]
    expected, found = run(model(nodes, angles), angles), run(gs.export_onnx(graph), angles)
    for theirs, ours in zip(expected, found, strict=True):
        assert compare(theirs, ours).max_abs <= 2e-6


# What stands in the place of what in a legal graph.
REFUSED = {
    "its keys are not those of the past and of this step": {"Concat<axis = 2>(pk, kt)": "Identity(kt)"},
    "the values of the past are no input": {"[vj]": "[pv2] pv2 = Identity(pv) [vj]", "(pv, vt)": "(pv2, vt)"},
    "its values are read before": {"[attention]": "[early] e = Identity(all_v) [attention]"},
    "q has heads of a number or size that is not known": {
        "[attention]": "[s] qs = llmexport.Unknown(qt) [attention]",
        "(qt, all_k": "(qs, all_k",
    },
    "its values are turned by Rope": {
        "[vj]": f"[vr] vr = {TURNS.format(i=0)}(vt, cos, sin) [vj]",
        "(pv, vt)": "(pv, vr)",
    },
    "what is attended has 2 consumers": {"[at]": "[more] z = Identity(a) [at]"},
    "the heads of what is attended are not put side by side": {"Reshape(back, flat)": "Identity(back)"},
}


@pytest.mark.parametrize("why", REFUSED)
def test_another_form_is_left_as_it_is(why):
    nodes = PLAIN
    for old, new in REFUSED[why].items():
        assert old in nodes
        nodes = nodes.replace(old, new)
    made = model(nodes, outputs=", float[B,2,S,8] e" * ("e = " in nodes) + ", float[B,4,T,8] z" * ("z = " in nodes))
    graph = gs.import_onnx(made)
    before = [n.op for n in graph.nodes]
    fused = lower_attention(graph)
    assert (fused.count, fused.refused) == (0, [("attention", why)])
    assert [n.op for n in graph.nodes] == before
