"""lower_static_attention: what it rewrites, what it leaves, and that the numbers stay."""

import itertools

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest
import slot_masks
from slot_graphs import BACK, MASK, SLOTS, SPLIT, TURN, TURNS, attention_of, in_bfloat16, run, run_in_place
from slot_masks import ATTEND, CHUNK, HELD, PLAIN, WRITE, feed, model

from llmexport.graphs.lower_static_attention import lower_static_attention
from llmexport.validate.compare import compare

ROPE = f"[qr] qr = {TURNS}(qt, cos, sin) [kr] kr = {TURNS}(kt, cos, sin)"
TURNED = f"{MASK} {SPLIT} {TURN} {ROPE} {WRITE.format(k='kr')} {ATTEND.format(q='qr')} {BACK}"
WINDOW = "near = Sub(own, window) gt = Greater(slots, near) le = And(le0, gt)"
# ALiBi's, by head: what is hidden is where a mask of numbers says so.
BIAS = """far = Sub(slots, own) far4 = Unsqueeze(far, one) apart = Cast<to = 1>(far4) steep = Mul(slopes, apart)
  bias = Where(mask, steep, hidden)"""
ALIBI = PLAIN.replace("all_v, mask)", "all_v, bias)").replace("[attention]", f"{BIAS} [attention]")
BACK_AGAIN = "[s] qs = Neg(qt) [r] ks = Neg(kt)"
SHAPED = "numbers = Reshape(flat_slots, all_of_row) "
FORMS = {
    "plain": PLAIN,
    "turned": TURNED,
    "window": PLAIN.replace("le = Less", "le0 = Less").replace("[shown]", WINDOW),
    "window of all": PLAIN.replace("le = Less", "le0 = Less").replace("[shown]", WINDOW.replace("window)", "slots9)")),
    "chunk": PLAIN.replace("le = Less", "le0 = Less").replace("[shown]", CHUNK),
    "bias by head": ALIBI,
    "q and k turned back": PLAIN.replace("[kj]", f"{BACK_AGAIN} [kj]")
    .replace("(qt, all", "(qs, all")
    .replace("(pk, kt", "(pk, ks"),
    "numbers that are shaped": SHAPED + PLAIN.replace("(slots, ", "(numbers, "),
}
BIASED = {
    "window": 3,
    "chunk": None,
    "bias by head": None,
}  # the forms that hide more than padding, and what window they tell of
# Rows, tokens and what is before: a prompt, its next token, one where rows end at different slots, and a later piece,
# which GroupQueryAttention takes of one row alone: of rows that go on, and of one that begins beside others.
STEPS = [(2, 4, [0, 0]), (2, 1, [4, 4]), (2, 1, [3, 8]), (1, 3, [5]), (2, 3, [5, 5]), (2, 3, [2, 6]), (3, 3, [0, 5, 2])]
TAKEN = [True, True, True, True, False, False, False]


@pytest.mark.parametrize("form", FORMS)
def test_slots_are_written_by_one_operator_and_the_numbers_stay(form):
    graph = gs.import_onnx(model(FORMS[form]))
    fused = lower_static_attention(graph)
    assert (fused.count, fused.refused) == (1, [])
    ops = [n.op for n in graph.nodes]
    assert not {"TensorScatter", "Attention", "Rope"} & {*ops}
    assert ops.count("Transpose") == (4 if "turned back" in form else 0)
    chosen, hiding = attention_of(graph)
    assert [n.op for n in hiding.attrs["else_branch"].nodes] == ["Scan"]
    assert [v.name for v in chosen.outputs] == ["y", "all_k", "all_v"]
    # What is outside of a window or a chunk is hidden by the bias as well.
    assert (chosen is hiding) is (form in BIASED)
    said = [n.attrs.get("local_window_size") for n in hiding.attrs["then_branch"].nodes]
    assert said == [BIASED.get(form, SLOTS if form == "window of all" else None)]
    made = gs.export_onnx(graph)
    for (rows, tokens, before), padded in itertools.product(STEPS, (True, False)):
        given = feed(rows, tokens, before, padded)
        expected, found = (
            run(model(FORMS[form]), given),
            run(onnx.ModelProto.FromString(made.SerializeToString()), given),
        )
        for values in (found, run_in_place(onnx.ModelProto.FromString(made.SerializeToString()), given)):
            for row, past in enumerate(before):
                # What lies behind the last token of a row is nobody's.
                for theirs, ours in zip(expected[1:], values[1:], strict=True):
                    assert np.array_equal(theirs[row, :, : past + tokens], ours[row, :, : past + tokens])
            assert compare(expected[0], values[0]).max_abs <= 2e-6


def test_a_step_takes_the_operator_unless_several_rows_go_on_by_several_tokens():
    graph = gs.import_onnx(model(PLAIN))
    lower_static_attention(graph)
    graph.outputs.extend(n.inputs[0] for n in attention_of(graph))
    made = gs.export_onnx(graph).SerializeToString()
    for padded in (True, False):
        found = [run(onnx.ModelProto.FromString(made), feed(*step, padded))[-2:] for step in STEPS]
        assert [can.item() for _, can in found] == TAKEN
        # Of a row alone nothing is padding.
        assert [bare.item() for bare, _ in found] == [
            t and (n == 1 or not padded) for t, (n, *_) in zip(TAKEN, STEPS, strict=True)
        ]


def test_what_layers_share_is_made_once():
    again = PLAIN.split("mask = Unsqueeze(any, one)")[1]
    for name in ("q_heads", "k_heads", "v_heads", "qt", "kt", "vt", "all_k", "all_v", "back"):
        again = again.replace(name, f"{name}2")
    again = again.replace("a = Att", "a2 = Att").replace("(a)", "(a2)").replace("pk", "pk2").replace("pv", "pv2")
    again = again.replace("y = R", "y2 = R").replace("[", "[again_")
    again = again.replace("perm = [again_", "perm = [")
    made = model(PLAIN + again, ", float[B,T,32] y2, float[B,2,9,8] all_k2, float[B,2,9,8] all_v2")
    for name in ("pk2", "pv2"):
        made.graph.input.append(onnx.helper.make_tensor_value_info(name, 1, ["B", 2, SLOTS, 8]))
    graph = gs.import_onnx(onnx.shape_inference.infer_shapes(made))
    assert lower_static_attention(graph).count == 2
    ops = [n.op for n in graph.nodes]
    assert (ops.count("If"), ops.count("And"), ops.count("ReduceMax")) == (3, 2, 1)


# What stands in the place of what in a legal graph.
BEHIND = "its mask may show keys that are written behind the query's"
REFUSED = {
    "it has not queries, keys, values and a mask alone": {"all_v, mask)": "all_v) m = Identity(mask)"},
    "its values have heads of another size than its keys": {
        "Reshape(v, two)": "Reshape(v, four_of_four)",
        "int64 none": "int64[4] four_of_four = {0, 0, 4, 4}, int64 none",
    },
    "its values are not slots that this step is written into": {
        "all_v = Tensor": "written = Tensor",
        "[attention]": "all_v = Identity(written) [attention]",
    },
    "its keys and values are written from different lengths on": {"(pv, vt, length)": "(pv, vt, padding)"},
    "its keys are read before": {"[attention]": "[early] e = Identity(all_k) [attention]"},
    "its values are turned by Rope": {
        "[vj]": f"[vr] vr = {TURNS}(vt, cos, sin) [vj]",
        "(pv, vt,": "(pv, vr,",
    },
    "what is attended has 2 consumers": {"[at]": "[more] z = Identity(a) [at]"},
    "its bias is of float16, its queries are not": {
        "all_v, mask)": "all_v, narrow)",
        "[attention]": f"{BIAS} narrow = Cast<to = 10>(bias) [attention]",
    },
    f"{BEHIND}: a bias that hides too little": {
        "all_v, mask)": "all_v, bias)",
        "[attention]": f"{BIAS} [attention]",
        "{-32768}": "{-100}",
    },
    f"{BEHIND}: a bias that shows what is hidden": {
        "all_v, mask)": "all_v, bias)",
        "[attention]": f"{BIAS} [attention]".replace("Where(mask, steep, hidden)", "Where(mask, hidden, steep)"),
    },
    f"{BEHIND}: shown beside": {"any = Or(both, eq)": "any0 = Or(both, eq) any = Or(any0, ge)"},
    f"{BEHIND}: the other way": {"LessOrEqual(slots, own)": "GreaterOrEqual(slots, own)"},
    f"{BEHIND}: of another length": {"Unsqueeze(length, one)": "Unsqueeze(padding, one)"},
    f"{BEHIND}: slots in another order": {"{0, 1, 2, 3, 4, 5, 6, 7, 8}": "{1, 0, 2, 3, 4, 5, 6, 7, 8}"},
    f"{BEHIND}: steps of two": {
        "Range(none, t, step)": "Range(none, t, two_steps)",
        "int64 none": "int64 two_steps = {2}, int64 none",
    },
}


@pytest.mark.parametrize("why", REFUSED)
def test_another_form_is_left_as_it_is(why, monkeypatch):
    nodes, held = PLAIN, HELD
    for old, new in REFUSED[why].items():
        assert old in nodes + held
        nodes, held = nodes.replace(old, new), held.replace(old, new)
    monkeypatch.setattr(slot_masks, "HELD", held)
    more = {"e = Id": ", float[B,2,9,8] e", "z = Id": ", float[B,4,T,8] z", "m = Id": ", bool[B,1,T,9] m"}
    made = model(nodes, "".join(text for name, text in more.items() if name in nodes))
    graph = gs.import_onnx(made)
    before = [n.op for n in graph.nodes]
    fused = lower_static_attention(graph)
    assert (fused.count, fused.refused) == (0, [("attention", why.partition(":")[0])])
    assert [n.op for n in graph.nodes] == before


def test_bfloat16_is_left_as_no_cpu_has_it():
    graph = in_bfloat16(model(PLAIN))
    assert lower_static_attention(graph).refused == [("attention", "it is of bfloat16, not of float32 or float16")]


def test_a_growing_cache_is_no_candidate():
    nodes = PLAIN.replace("TensorScatter<axis = -2>(pk, kt, length)", "Concat<axis = 2>(pk, kt)")
    assert lower_static_attention(gs.import_onnx(model(nodes))).refused == []
