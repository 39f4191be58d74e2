"""lower_latent_attention: what it rewrites, what it leaves, and that the numbers stay."""

import itertools

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest
from slot_graphs import MASK, SLOTS, in_bfloat16, run, run_in_place, tell

from llmexport.graphs.lower_latent_attention import lower_latent_attention
from llmexport.validate.compare import compare
from llmexport.validate.tolerance import TOLERANCE, Tolerance

ROUNDED = Tolerance(1e-6, 1e-6, scaled=True)
# Four heads: keys of 6 and a shared part of 2, values of 5, latents of 8.
INPUTS = "float[B,4,T,6] bare, float[B,4,T,2] turned, float[44,8] w, float[B,1,T,8] latent, float[B,1,T,2] shared"
HELD = """int64[3] apart = {4, 11, 8}, int64[1] zero = {0}, int64[1] six = {6}, int64[1] eleven = {11},
  int64[1] eight = {8}, int64[1] three = {3}, int64[1] one = {1}, int64[1] last = {2}, int64 none = {0},
  int64 step = {1}, int64[3] row = {-1, 1, 1}, int64[1,1,9] slots = {0, 1, 2, 3, 4, 5, 6, 7, 8}"""
OF_SLOTS = MASK.replace("Shape<start = 1, end = 2>(q)", "Shape<start = 2, end = 3>(bare)")
SCATTER = "all_k = TensorScatter<axis = -2>(pk, latent, length) all_v = TensorScatter<axis = -2>(pv, shared, length)"
JOIN = "all_k = Concat<axis = 2>(pk, latent) all_v = Concat<axis = 2>(pv, shared)"
LAYER = """
  matrices = Reshape(w, apart) [km] of_keys = Slice(matrices, zero, six, one, one) absorbed = MatMul(bare, of_keys)
  query = Concat<axis = -1>(absorbed, turned) joined = Concat<axis = -1>(all_k, all_v)
  [attention] mixed = Attention<scale = 0.3>(query, joined, joined, mask) kept = Slice(mixed, zero, eight, three, one)
  [vm] of_values = Slice(matrices, six, eleven, one, one) columns = Transpose<perm = [0, 1, 3, 2]>(kept)
  attended = MatMul(of_values, columns) y = Transpose<perm = [0, 3, 1, 2]>(attended)
"""
STATIC, GROWING = f"{OF_SLOTS} {SCATTER} {LAYER}", f"{JOIN} {LAYER}"
FORMS = {"static": STATIC, "growing": GROWING}
# Rows, tokens and what is before: a token, a prompt and its next token, rows that end at different slots, and pieces
# behind a past, short and long; and whether such a step makes keys and values of each head.
STEPS = [(1, 1, [0]), (2, 4, [0, 0]), (2, 1, [4, 4]), (3, 1, [3, 8, 1]), (2, 2, [2, 6]), (1, 2, [7]), (2, 5, [1, 1])]
STEPS += [(3, 3, [0, 5, 2]), (1, 7, [2]), (2, 63, [0, 0]), (1, 130, [5])]
EXPANDS = [True, True, False, False, False, False, True, False, True, True, True]


def model(nodes: str, outputs: str = "", inputs: str = "") -> onnx.ModelProto:
    of_slots = "TensorScatter" in nodes
    past, total = (SLOTS, SLOTS) if of_slots else ("P", "S")
    more = "int64[B] length, int64[B] padding" if of_slots else "bool[B,1,T,S] mask"
    pasts = f"float[B,1,{past},8] pk, float[B,1,{past},2] pv"
    ends = f"float[B,T,4,5] y, float[B,1,{total},8] all_k, float[B,1,{total},2] all_v{outputs}"
    given = f"({INPUTS}, {more}, {pasts}{inputs}) => ({ends}) <{HELD}>"
    text = f'<ir_version: 10, opset_import: ["": 24]> g {given} {{ {nodes} }}'
    made = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))
    # Of the steps' number onnx does not know that it is T.
    tell(made, {"mask": (9, "B", 1, "T", SLOTS)} if of_slots else {})
    return made


def feed(count: int, tokens: int, before: list[int], form: str) -> dict[str, np.ndarray]:
    rng, padding, past = np.random.default_rng(0), np.array([0, 2, 1])[:count], max(before)
    shapes = {"bare": (count, 4, tokens, 6), "turned": (count, 4, tokens, 2), "w": (44, 8)}
    shapes |= {"latent": (count, 1, tokens, 8), "shared": (count, 1, tokens, 2)}
    slots = SLOTS if form == "static" else past
    shapes |= {"pk": (count, 1, slots, 8), "pv": (count, 1, slots, 2)}
    given = {n: rng.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()}
    if form == "static":
        # What nobody wrote, in no row, is not read.
        for name in ("pk", "pv"):
            given[name][:, :, past + tokens :] = np.nan
        return given | {"length": np.array(before), "padding": padding}
    keys, queries = np.arange(past + tokens), past + np.arange(tokens)[:, None]
    shown = (keys <= queries) & (keys >= padding[:, None, None]) | (keys == queries)
    return given | {"mask": shown[:, None]}


def steps_of(form: str) -> list[tuple[int, int, list[int]]]:
    return [s for s in STEPS if form == "growing" or s[1] + max(s[2]) <= SLOTS]


def lowered(form: str) -> gs.Graph:
    graph = gs.import_onnx(model(FORMS[form]))
    fused = lower_latent_attention(graph)
    assert (fused.count, fused.refused) == (1, [])
    return graph


@pytest.mark.parametrize("form", FORMS)
def test_numbers_stay_in_either_form_of_a_step(form):
    graph = lowered(form)
    assert not {"Attention", "MatMul"} & {n.op for n in graph.nodes}
    made = gs.export_onnx(graph).SerializeToString()
    for count, tokens, before in steps_of(form):
        given = feed(count, tokens, before, form)
        whole = {n: np.nan_to_num(a) if n in ("pk", "pv") else a for n, a in given.items()}
        expected, found = run(model(FORMS[form]), whole), run(onnx.ModelProto.FromString(made), given)
        in_place = run_in_place(onnx.ModelProto.FromString(made), given) if form == "static" else found
        for ours in (found, in_place):
            assert compare(expected[0], ours[0]).excess(ROUNDED) <= 1
            for theirs, state in zip(expected[1:], ours[1:], strict=True):
                assert np.array_equal(theirs, np.nan_to_num(state))


@pytest.mark.parametrize("form", FORMS)
def test_a_step_makes_keys_and_values_where_that_takes_fewer_products(form):
    graph = lowered(form)
    graph.outputs.append(next(n for n in graph.nodes if n.op == "If").inputs[0])
    made = gs.export_onnx(graph).SerializeToString()
    taken = [run(onnx.ModelProto.FromString(made), feed(*step, form))[-1].item() for step in steps_of(form)]
    assert taken == [e for e, step in zip(EXPANDS, STEPS, strict=True) if step in steps_of(form)]


@pytest.mark.parametrize("form", FORMS)
def test_float16_is_as_near_as_it_may_be(form):
    def halved(made: onnx.ModelProto) -> onnx.ModelProto:
        for value in (*made.graph.input, *made.graph.output, *made.graph.value_info):
            if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
                value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
        return made

    graph = gs.import_onnx(halved(model(FORMS[form])))
    assert lower_latent_attention(graph).count == 1
    made = gs.export_onnx(graph).SerializeToString()
    for step in steps_of(form):
        drawn = feed(*step, form)
        floats = {n: np.nan_to_num(a).astype(np.float16) for n, a in drawn.items() if a.dtype == np.float32}
        given, wide = drawn | floats, drawn | {n: a.astype(np.float32) for n, a in floats.items()}
        exact, found = run(model(FORMS[form]), wide)[0], run(onnx.ModelProto.FromString(made), given)[0]
        assert compare(exact, found).excess(TOLERANCE["float16"]) <= 1


@pytest.mark.parametrize("form", FORMS)
def test_what_layers_share_is_made_once(form):
    names = ("matrices", "of_keys", "of_values", "absorbed", "query", "joined", "mixed", "kept", "columns", "attended")
    again = FORMS[form].removeprefix(OF_SLOTS).replace("[attention]", "[again]").replace("m]", "m2]")
    for name, end in itertools.product((*names, "all_k", "all_v", "pk", "pv"), (" =", ",", ")")):
        again = again.replace(name + end, f"{name}2{end}")
    past, total = (SLOTS, SLOTS) if form == "static" else ("P", "S")
    inputs = f", float[B,1,{past},8] pk2, float[B,1,{past},2] pv2"
    outputs = f", float[B,T,4,5] y2, float[B,1,{total},8] all_k2, float[B,1,{total},2] all_v2"
    graph = gs.import_onnx(model(FORMS[form] + again.replace("y =", "y2 ="), outputs, inputs))
    assert lower_latent_attention(graph).count == 2
    ops = [n.op for n in graph.nodes]
    assert (ops.count("If"), ops.count("Less"), ops.count("Sub")) == (3, 1, 1)
    # The mask, latents and shared keys of each layer, matrices.
    assert ops.count("Slice") == (1 + 4 if form == "static" else 0) + 4


# What stands in the place of what in a legal graph of slots.
NOT_ALONE = "it has not queries, keys, values and a mask alone"
NO_LATENTS = "its keys are not latents and what heads share"
NO_PRODUCTS = "its queries are not products with matrices and what is turned"
NO_MATRICES = "its matrices are not [H, D, L] that nodes make"
BEHIND = "its mask may show keys that are written behind the query's"
LENGTHS = "its latents and shared keys are not written from one length on"
REFUSED = {
    NOT_ALONE: {"joined, mask)": "joined) m = Identity(mask)"},
    f"{NOT_ALONE}: causal": {"<scale = 0.3>": "<scale = 0.3, is_causal = 1>"},
    NO_LATENTS: {"Concat<axis = -1>(all_k, all_v)": "Concat<axis = -1>(all_k, all_v, all_v)"},
    NO_PRODUCTS: {"Concat<axis = -1>(absorbed, turned)": "Concat<axis = -1>(bare, turned, turned)"},
    f"{NO_PRODUCTS}: of others": {
        "absorbed = MatMul(bare, of_keys)": "a = MatMul(bare, of_keys) absorbed = Identity(a)"
    },
    "what is attended has 2 consumers": {"kept = Slice": "z = Identity(mixed) kept = Slice"},
    "what is attended is not multiplied with matrices alone": {"MatMul(of_values, columns)": "Identity(columns)"},
    "of what is attended not the latents are kept": {"Slice(mixed, zero, eight": "Slice(mixed, zero, six"},
    "what is attended is not turned back": {"[0, 3, 1, 2]": "[0, 1, 3, 2]"},
    NO_MATRICES: {"[km] of_keys = Slice(matrices, zero, six, one, one)": "", "bare, of_keys": "bare, given"},
    "its mask is not [B, 1, T, N]": {"joined, mask)": "joined, of_heads)"},
    LENGTHS: {"(pv, shared, length)": "(pv, shared, padding)"},
    f"{LENGTHS}: one joined": {"TensorScatter<axis = -2>(pv, shared, length)": "Identity(pv)"},
    "its latents are not slots that this step is written into": {"<axis = -2>(pk": '<axis = -2, mode = "circular">(pk'},
    BEHIND: {"any = Or(both, eq)": "any0 = Or(both, eq) any = Or(any0, ge)"},
    f"{BEHIND}: of another length": {"Unsqueeze(length, one)": "Unsqueeze(padding, one)"},
}


@pytest.mark.parametrize("why", REFUSED)
def test_another_form_is_left_as_it_is(why):
    nodes = STATIC
    for old, new in REFUSED[why].items():
        assert old in nodes
        nodes = nodes.replace(old, new)
    more = {"m = Id": ", bool[B,1,T,9] m", "z = Id": ", float[B,4,T,10] z"}
    ends = "".join(text for name, text in more.items() if name in nodes)
    graph = gs.import_onnx(model(nodes, ends, ", float[4,6,8] given, bool[B,4,T,9] of_heads"))
    fused = lower_latent_attention(graph)
    assert (fused.count, fused.refused) == (0, [("attention", why.partition(":")[0])])
    ops = [n.op for n in graph.nodes]
    assert (ops.count("Attention"), ops.count("If")) == (1, 0)


def test_a_layer_whose_middle_is_a_graph_output_is_left():
    graph = gs.import_onnx(model(STATIC, ", float[B,4,T,8] kept"))
    assert lower_latent_attention(graph).refused == [("attention", "what is attended is a graph output")]


def test_bfloat16_is_left_as_no_cpu_has_it():
    graph = in_bfloat16(model(STATIC))
    assert lower_latent_attention(graph).refused == [("attention", "it is of bfloat16, not of float32 or float16")]


def test_attention_of_values_beside_keys_is_no_candidate():
    nodes = GROWING.replace("(query, joined, joined,", "(query, joined, other,").replace(
        "[attention]", "other = Identity(joined) [attention]"
    )
    assert lower_latent_attention(gs.import_onnx(model(nodes))).refused == []
