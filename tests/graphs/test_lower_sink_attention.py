"""lower_sink_attention: what it rewrites, what it leaves, and that the numbers stay."""

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest
from slot_graphs import SLOTS, SPLIT, TURN, TURNS, attention_of, in_bfloat16, operands, run, tell

from llmexport.graphs.lower_sink_attention import lower_sink_attention
from llmexport.plugins.spec import DOMAIN
from llmexport.validate.compare import compare

INPUTS = (
    "float[B,T,32] q, float[B,T,16] k, float[B,T,16] v, int64[B] past, int32[B] start, "
    "float[4] sinks, float[B,T,4] cos, float[B,T,4] sin, float[B,2,9,8] pk, float[B,2,9,8] pv"
)
HELD = "int64[4] four = {0, 0, 4, 8}, int64[4] two = {0, 0, 2, 8}, int64[3] flat = {0, 0, 32}, int64 slots = {9}"
END = "t1 = Shape<start = 1, end = 2>(q) t = Squeeze(t1) end = Add(past, t) [len] length = Cast<to = 6>(end)"
WRITE = "[kj] all_k = TensorScatter<axis = -2>(pk, kt, past) [vj] all_v = TensorScatter<axis = -2>(pv, vt, past)"
JOIN = "[kj] all_k = Concat<axis = 2>(pk, kt) [vj] all_v = Concat<axis = 2>(pv, vt)"
SINKS = f"{DOMAIN}.SinkAttention<scale = 0.3, softcap = 0.0, window = 0>(qt, all_k, all_v, start, length, sinks)"
ATTEND = f"[attention] a = {SINKS}"
PLAIN = f"{END} {SPLIT} {TURN} {WRITE} {ATTEND} [flat] y = Reshape(a, flat)"
LAST = "own = Sub(end, past) last = Add(own, slots) [len] length = Cast<to = 6>(last)"
ROPE = f"[qr] qr = {TURNS}(qt, cos, sin) [kr] kr = {TURNS}(kt, cos, sin)"
BACK_AGAIN = "q and v turned back"
FORMS = {
    "plain": PLAIN,
    "no sinks": PLAIN.replace(", sinks)", ")"),
    "turned": PLAIN.replace(WRITE, f"{ROPE} {WRITE}").replace("(qt, all", "(qr, all").replace("kt, past", "kr, past"),
    "window": PLAIN.replace("window = 0", "window = 3"),
    BACK_AGAIN: PLAIN.replace("[kj]", "[s] qs = Neg(qt) [r] vs = Neg(vt) [kj]").replace("(qt, all", "(qs, all").replace(
        "(pv, vt", "(pv, vs"
    ),
    "cap": PLAIN.replace("softcap = 0.0", "softcap = 2.0"),
    "joined": PLAIN.replace(WRITE, JOIN).replace("window = 0", "window = 5").replace(END[END.index("[len]"):], LAST),
}  # fmt: skip
# Tokens of a step, and what of each row is before it and hidden: a prompt, padded; its next token; one where rows end
# at different slots, and a later piece, which GroupQueryAttention takes of one row alone: of rows that go on, and
# of one that begins beside others.
STEPS = [
    (4, [0, 0], [0, 2]),
    (1, [4, 4], [0, 2]),
    (1, [3, 8], [1, 0]),
    (3, [5], [2]),
    (3, [5, 5], [0, 4]),
    (3, [2, 6], [0, 1]),
    (3, [0, 5, 2], [0, 1, 4]),
]
TAKEN = [True, True, True, True, False, False, False]


def model(nodes: str, outputs: str = "") -> onnx.ModelProto:
    keys = "S" if "Concat" in nodes else SLOTS
    ends = f"float[B,T,32] y, float[B,2,{keys},8] all_k, float[B,2,{keys},8] all_v" + outputs
    header = f'<ir_version: 10, opset_import: ["": 24, "{DOMAIN}": 1]>'
    text = f"{header} g ({INPUTS}) => ({ends}) <{HELD}> {{ {nodes} }}"
    made = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))
    # onnx infers no shape of our ops' outputs, nor behind them.
    typed = dict.fromkeys(("qt", "qr", "qs"), (1, "B", 4, "T", 8)) | dict.fromkeys(
        ("kt", "kr", "vt", "vs"), (1, "B", 2, "T", 8)
    )
    typed |= dict.fromkeys(("a", "q_heads"), (1, "B", "T", 4, 8))
    typed |= {"length": (6, "B"), "k_heads": (1, "B", "T", 2, 8), "v_heads": (1, "B", "T", 2, 8)}
    tell(made, typed)
    return made


def feed(form: str, tokens: int, before: list[int], hidden: list[int]) -> dict[str, np.ndarray]:
    given = operands(len(before), tokens) | {"past": np.array(before), "start": np.array(hidden, np.int32)}
    return given | {"sinks": np.random.default_rng(1).standard_normal(4).astype(np.float32)}


@pytest.mark.parametrize("form", FORMS)
def test_slots_are_written_by_one_operator_and_the_numbers_stay(form):
    graph = gs.import_onnx(model(FORMS[form]))
    fused = lower_sink_attention(graph)
    assert (fused.count, fused.refused) == (1, [])
    ops = [n.op for n in graph.nodes]
    assert not {"TensorScatter", "SinkAttention", "Rope"} & {*ops}
    assert ops.count("Transpose") == (4 if form == BACK_AGAIN else 0)
    assert not [n for n in graph.nodes if n.op == "Concat" and n.inputs[0].name in ("pk", "pv")]
    chosen, hiding = attention_of(graph)
    assert [n.op for n in hiding.attrs["else_branch"].nodes] == [*(["Cast", "Sub"] if form == "joined" else []), "Scan"]
    assert [v.name for v in chosen.outputs] == ["y", "all_k", "all_v"]
    graph.outputs.extend(n.inputs[0] for n in (chosen, hiding))
    made = gs.export_onnx(graph).SerializeToString()
    shown = [(*step[:2], [0] * len(step[2])) for step in STEPS]
    for (tokens, before, hidden), takes in zip([*STEPS, *shown], TAKEN * 2, strict=True):
        given = feed(form, tokens, before, hidden)
        expected, found = run(model(FORMS[form]), given), run(onnx.ModelProto.FromString(made), given)
        # Behind slots that were all there before, rows begin at once in none.
        can = takes and not (form == "joined" and tokens > 1 and len(before) > 1)
        assert [v.item() for v in (found.pop(), found.pop())] == [can, can and not any(hidden)]
        for row, past in enumerate(before):
            end = tokens + (SLOTS if form == "joined" else past)
            # What lies behind the last token of a row is nobody's.
            for theirs, ours in zip(expected[1:], found[1:], strict=True):
                assert np.array_equal(theirs[row, :, :end], ours[row, :, :end])
        # Padding sees no key, and gives zeros.
        assert compare(expected[0], found[0]).max_abs <= 2e-6


def test_sinks_of_another_type_are_cast():
    made = model(PLAIN)
    [sinks] = [i for i in made.graph.input if i.name == "sinks"]
    sinks.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    given = feed("plain", 1, [4, 4], [0, 2])
    given["sinks"] = given["sinks"].astype(np.float16)
    graph = gs.import_onnx(made)
    lower_sink_attention(graph)
    found = run(onnx.ModelProto.FromString(gs.export_onnx(graph).SerializeToString()), given)
    assert compare(run(made, given)[0], found[0]).max_abs <= 2e-6


def test_what_layers_share_is_made_once():
    again = FORMS["turned"]
    for name in ("q_heads", "k_heads", "v_heads", "qt", "kt", "vt", "qr", "kr", "all_k", "all_v"):
        again = again.replace(name, f"{name}2")
    again = (
        again.replace("a = llm", "a2 = llm").replace("(a, flat", "(a2, flat").replace("pk", "pk2").replace("pv", "pv2")
    )
    again = again.replace("y = R", "y2 = R").replace("[", "[again_").replace("perm = [again_", "perm = [")
    made = model(FORMS["turned"] + again, ", float[B,T,32] y2, float[B,2,9,8] all_k2, float[B,2,9,8] all_v2")
    for name in ("pk2", "pv2"):
        made.graph.input.append(onnx.helper.make_tensor_value_info(name, 1, ["B", 2, SLOTS, 8]))
    made.graph.value_info.extend(
        onnx.helper.make_tensor_value_info(
            f"{v.name}2", 1, [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        )
        for v in [*made.graph.value_info]
    )
    graph = gs.import_onnx(made)
    assert lower_sink_attention(graph).count == 2
    ops = [n.op for n in graph.nodes]
    assert (ops.count("If"), ops.count("And"), ops.count("ReduceMax")) == (3, 1, 2)


# What stands in the place of what in a legal graph.
ELSEWHERE = "its keys may end elsewhere than the step that is written"
REFUSED = {
    "its values have heads of another size than its keys": {
        "Reshape(v, two)": "Reshape(v, four_of_four)",
        "int64[4] two": "int64[4] four_of_four = {0, 0, 4, 4}, int64[4] two",
    },
    "its values are not slots that this step is written into or joined to": {
        "all_v = Tensor": "written = Tensor",
        "[attention]": "all_v = Identity(written) [attention]",
    },
    "its values are written in a circle": {'all_v = TensorScatter<': 'all_v = TensorScatter<mode = "circular", '},
    "its keys and values are not written alike": {"(pv, vt, past)": "(pv, vt, far)", "[q4]": "far = Neg(past) [q4]"},
    "the keys of the past are no input": {"(pk, kt": "(pk0, kt", "[kj]": "pk0 = Neg(pk) [kj]"},
    "its keys are read before": {"[attention]": "[early] e = Identity(all_k) [attention]"},
    ELSEWHERE: {"Add(past, t)": "Max(past, t)"},
    f"{ELSEWHERE}: earlier": {"Add(past, t)": "Sub(past, t)"},
    f"{ELSEWHERE}: of other rows": {"Add(past, t)": "Add(others, t)", "t1 = S": "others = Abs(past) t1 = S"},
    f"{ELSEWHERE}: of other steps": {"(q) t =": "(pk) t ="},
    "its values are turned by Rope": {"[vj]": f"[vr] vr = {TURNS}(vt, cos, sin) [vj]", "(pv, vt,": "(pv, vr,"},
    "what is attended has 2 consumers": {"[flat]": "[more] z = Identity(a) [flat]"},
    "the heads of what is attended are not put side by side": {"Reshape(a,": "Reshape(b,", "[flat]": "b = Abs(a) [f]"},
    "neither q, k nor v is [B, T, H, D] with its heads turned to the front": {
        "Transpose<perm = [0, 2, 1, 3]>": f"{DOMAIN}.Unknown"
    },
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_another_form_is_left_as_it_is(why, monkeypatch):
    nodes, held = PLAIN, HELD
    for old, new in REFUSED[why].items():
        assert old in nodes + held
        nodes, held = nodes.replace(old, new), held.replace(old, new)
    monkeypatch.setitem(globals(), "HELD", held)
    more = {"e = Id": ", float[B,2,9,8] e", "z = Id": ", float[B,T,4,8] z"}
    made = model(nodes, "".join(text for name, text in more.items() if name in nodes))
    for value in made.graph.value_info:
        if value.name == "v_heads" and "four_of_four" in nodes:
            value.CopyFrom(onnx.helper.make_tensor_value_info("v_heads", 1, ["B", "T", 4, 4]))
    made.graph.value_info.append(onnx.helper.make_tensor_value_info("pk0", 1, ["B", 2, SLOTS, 8]))
    graph = gs.import_onnx(made)
    before = [n.op for n in graph.nodes]
    fused = lower_sink_attention(graph)
    assert (fused.count, fused.refused) == (0, [("attention", why.partition(":")[0])])
    assert [n.op for n in graph.nodes] == before


def test_bfloat16_is_left_as_no_cpu_has_it():
    graph = in_bfloat16(model(PLAIN))
    assert lower_sink_attention(graph).refused == [("attention", "it is of bfloat16, not of float32 or float16")]


def test_a_growing_cache_is_no_candidate():
    made = model(PLAIN.replace(WRITE, JOIN))
    for value in made.graph.input:
        if value.name in ("pk", "pv"):
            value.type.tensor_type.shape.dim[2].dim_param = "past"
    assert lower_sink_attention(gs.import_onnx(made)).refused == []
