"""lower_attention of slots that move up: a step's keys are joined to those of the last tokens before it."""

import itertools

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from slot_graphs import SLOTS, run
from slot_masks import CHUNK, PLAIN, WRITE, feed, model

from llmexport.graphs.lower_attention import lower_attention
from llmexport.validate.compare import compare

JOIN = "[kj] all_k = Concat<axis = 2>(pk, kt) [vj] all_v = Concat<axis = 2>(pv, vt)"
NUMBERS = """back_to = Reshape(length, row) far = Sub(back_to, slots9) many = Add(slots9, t)
  from0 = Range(none, many, step) numbers = Add(far, from0)"""
MOVING = PLAIN.replace(WRITE.format(k="kt"), JOIN).replace("(slots, ", "(numbers, ").replace("le = Less", "le0 = Less")
MOVING = MOVING.replace("[rows]", f"{NUMBERS} [rows]")
NEAR = "near = Sub(own, slots9) gt = Greater(numbers, near) le = And(le0, gt)"
MOVES = {
    "window": MOVING.replace("[shown]", NEAR),
    "narrower window": MOVING.replace("[shown]", NEAR.replace("slots9", "window")),
    "chunk": MOVING.replace("[shown]", CHUNK.replace("(slots", "(numbers")),
}
# Rows, tokens, and how many were before them: prompts, the next token, rows that end at different slots, later pieces,
# one that begins beside others, and rows that are longer than the slots.
STEPS = [(2, 4, [0, 0]), (1, 12, [0]), (3, 12, [0, 0, 0]), (1, 1, [0]), (2, 1, [4, 4]), (2, 1, [3, 8]), (1, 3, [5])]
STEPS += [(2, 3, [2, 6]), (3, 3, [0, 5, 2]), (2, 1, [9, 12]), (1, 3, [20]), (2, 3, [15, 11])]


def lowered(nodes: str) -> tuple[gs.Graph, gs.Node]:
    """The graph, and the If in the place of its attention."""
    graph = gs.import_onnx(model(nodes, keys="K"))
    fused = lower_attention(graph)
    assert (fused.count, fused.refused) == (1, [])
    [chosen] = [n for n in graph.nodes if n.name == "attention/slots"]
    return graph, chosen


@pytest.mark.parametrize("form", MOVES)
def test_rows_that_begin_take_another_operator_and_the_numbers_stay(form):
    graph, chosen = lowered(MOVES[form])
    then, otherwise = (chosen.attrs[f"{branch}_branch"].nodes for branch in ("then", "else"))
    assert [n.op for n in then if n.domain] == ["GroupQueryAttention"]
    assert [n.op for n in otherwise] == ["Attention"]
    assert not {"Transpose", "Concat"} & {n.op for n in graph.nodes}
    made = gs.export_onnx(graph).SerializeToString()
    for (rows, tokens, before), padded in itertools.product(STEPS, (True, False)):
        given = feed(rows, tokens, before, padded)
        expected = run(model(MOVES[form], keys="K"), given)
        found = run(onnx.ModelProto.FromString(made), given)
        for theirs, ours in zip(expected[1:], found[1:], strict=True):
            assert np.array_equal(theirs, ours)
        assert compare(expected[0], found[0]).max_abs <= 2e-6


def test_rows_begin_where_none_is_shown_a_slot():
    graph, chosen = lowered(MOVES["window"])
    graph.outputs.append(chosen.inputs[0])
    made = gs.export_onnx(graph).SerializeToString()
    for (rows, tokens, before), padded in itertools.product(STEPS, (True, False)):
        given = feed(rows, tokens, before, padded)
        seen = given["length"] > given["padding"]
        assert run(onnx.ModelProto.FromString(made), given)[-1].item() is not bool(seen.any())


def test_what_layers_share_is_made_once():
    again = MOVES["window"].split("mask = Unsqueeze(any, one)")[1]
    for name in ("q_heads", "k_heads", "v_heads", "qt", "kt", "vt", "all_k", "all_v", "back"):
        again = again.replace(name, f"{name}2")
    again = again.replace("a = Att", "a2 = Att").replace("(a)", "(a2)").replace("pk", "pk2").replace("pv", "pv2")
    again = again.replace("y = R", "y2 = R").replace("[", "[again_").replace("perm = [again_", "perm = [")
    made = model(MOVES["window"] + again, ", float[B,T,32] y2, float[B,2,K,8] all_k2, float[B,2,K,8] all_v2", keys="K")
    for name in ("pk2", "pv2"):
        made.graph.input.append(onnx.helper.make_tensor_value_info(name, 1, ["B", 2, SLOTS, 8]))
    graph = gs.import_onnx(onnx.shape_inference.infer_shapes(made))
    assert lower_attention(graph).count == 2
    ops = [n.op for n in graph.nodes]
    # The bias, and one a layer.
    assert (ops.count("If"), ops.count("ReduceMax")) == (3, 1)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("any = Or(both, eq)", "any0 = Or(both, eq) any = Or(any0, ge)"),
        ("far = Sub(back_to, slots9)", "far = Sub(back_to, window)"),
        ("back_to = Reshape(length, row)", "back_to = Reshape(padding, row)"),
        ("from0 = Range(none, many, step)", "from0 = Range(step, many, step)"),
    ],
    ids=["it shows later keys", "of fewer slots", "of another length", "of slots from the second on"],
)
def test_a_mask_that_does_not_tell_of_slots_is_left_to_attention(old, new):
    assert old in MOVES["window"]
    graph = gs.import_onnx(model(MOVES["window"].replace(old, new), keys="K"))
    assert lower_attention(graph).count == 1
    assert "If" not in {n.op for n in graph.nodes}
