"""fuse_cache_write: what it fuses, what it refuses, and that the numbers stay."""

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest
from one_node import session

from llmexport.export.graph_file import load_body
from llmexport.graphs.bodies import attach_bodies
from llmexport.graphs.fuse_cache_write import fuse_cache_write
from llmexport.graphs.fusion import Fused
from llmexport.plugins.spec import DOMAIN

# Two layers, of four heads of 8 of q, two of k and v; sixteen slots.
INPUTS = "float[B,N,4,8] q, float[B,N,2,8] k, float[B,N,2,8] v, float[B,N,3] cos, float[B,N,3] sin, float[8] w"
INPUTS += ", int64[B] mask, float[B,2,16,8] pk, float[B,2,16,8] pv, float[B,2,16,8] pk2, float[B,2,16,8] pv2"
OUTPUTS = "float[B,4,N,8] y, float[B,2,16,8] keys, float[B,2,16,8] values"
OUTPUTS += ", float[B,2,16,8] keys2, float[B,2,16,8] values2"
SAID = "epsilon = 0.1, weight_offset = 0.0, round_before_weight = 0, interleaved = 0, norm_first = 1"
OP = f"llmexport.QkNormRope<{SAID}>"
ATTRIBUTES = {"weight_offset": 0.0, "round_before_weight": 0, "interleaved": 0, "norm_first": 1}


def layer(n: str = "", weights: str = "") -> str:
    return (
        f"[op{n}] query{n}, kt{n}, vt{n} = {OP}(q, k, v, cos, sin{weights}) "
        f"[ks{n}] keys{n} = TensorScatter<axis = -2>(pk{n}, kt{n}, at) "
        f"[vs{n}] values{n} = TensorScatter<axis = -2>(pv{n}, vt{n}, at)"
    )


PLAIN = f"[at] at = Abs(mask) {layer()} {layer('2', ', w, w')} [sum] y = Add(query, query2)"


def model(nodes: str, more: str = "") -> onnx.ModelProto:
    header = f'<ir_version: 10, opset_import: ["": 24, "{DOMAIN}": 1]>'
    made = onnx.parser.parse_model(f"{header} g ({INPUTS}) => ({OUTPUTS}{more}) {{ {nodes} }}")
    # The op is ours, and onnx infers no shape behind it.
    for value, heads in [(f"{v}{n}", h) for n in ("", "2") for v, h in (("query", 4), ("kt", 2), ("vt", 2))]:
        made.graph.value_info.append(onnx.helper.make_tensor_value_info(value, 1, ["B", heads, "N", 8]))
    return onnx.shape_inference.infer_shapes(made)


def graph(nodes: str, more: str = "") -> gs.Graph:
    return gs.import_onnx(model(nodes, more))


def ops(made: gs.Graph) -> list[str]:
    return [n.op for n in made.nodes]


def changed(*changes: tuple[str, str]) -> str:
    nodes = PLAIN
    for old, new in changes:
        assert old in nodes
        nodes = nodes.replace(old, new)
    return nodes


def test_one_op_stands_for_three_and_the_indices_are_cast_once() -> None:
    made = graph(PLAIN)
    assert fuse_cache_write(made) == Fused(2, [])
    assert ops(made) == ["Abs", "Cast", "QkNormRopeWrite", "QkNormRopeWrite", "Add"]
    cast = made.nodes[1]
    one, other = sorted(made.nodes[2:4], key=lambda node: len(node.inputs))
    assert (cast.inputs[0].name, cast.attrs, cast.outputs[0].dtype) == ("at", {"to": 6}, np.int32)
    assert (one.name, one.domain) == ("opWrite", DOMAIN)
    assert {n: v for n, v in one.attrs.items() if n != "epsilon"} == ATTRIBUTES
    taken = ["q", "k", "v", "cos", "sin", "pk", "pv", cast.outputs[0].name]
    assert [v.name for v in one.inputs] == taken
    assert [v.name for v in one.outputs] == ["query", "keys", "values"]
    assert [v.name for v in other.inputs] == [*taken[:5], "pk2", "pv2", taken[7], "w", "w"]


def test_indices_may_be_an_input() -> None:
    made = graph(PLAIN.replace("[at] at = Abs(mask)", "").replace("at)", "mask)"))
    assert fuse_cache_write(made) == Fused(2, [])
    assert ops(made)[0] == "Cast"


def test_numbers_stay(static_caches: None) -> None:
    before, made = model(PLAIN), graph(PLAIN)
    fuse_cache_write(made)
    after = gs.export_onnx(made, ir_version=10)
    for one in (before, after):
        attach_bodies(one, load_body)
    onnx.checker.check_model(after)
    rng = np.random.default_rng(0)
    feeds = {}
    for value in before.graph.input:
        shape = [d.dim_value or {"B": 2, "N": 3}[d.dim_param] for d in value.type.tensor_type.shape.dim]
        feeds[value.name] = rng.standard_normal(shape, np.float32)
    feeds["mask"] = np.array([5, 13])
    expected, found = (session(one).run(None, feeds) for one in (before, after))
    # The same operators of the same numbers.
    assert all(np.array_equal(e, f) for e, f in zip(expected, found, strict=True))


# By the reason, what stands in the place of what in the first layer.
REFUSED = {
    # Case 1.
    "key has 2 consumers": [("[sum]", "[more] z = Neg(kt) [sum]")],
    "value is not only written into slots": [("TensorScatter<axis = -2>(pv, vt, at)", "Concat<axis = 2>(pv, vt)")],
    "key is not only written into slots": [("(pk, kt, at)", "(kt, pk, at)")],
    "key is written in a circle, or along another axis than the slots'": [
        ("[ks] keys = TensorScatter<axis = -2>", '[ks] keys = TensorScatter<axis = -2, mode = "circular">')
    ],
    "value is written in a circle, or along another axis than the slots'": [
        ("[vs] values = TensorScatter<axis = -2>", "[vs] values = TensorScatter<axis = 1>")
    ],
    "key is written from no slot that is said": [("(pk, kt, at)", "(pk, kt)"), ("(pv, vt, at)", "(pv, vt)")],
    # Case 2.
    "key and value are written from other slots on": [("(pv, vt, at)", "(pv, vt, mask)")],
    # Case 3.
    "others read its pasts too": [("[sum]", "[more] z = Neg(pk) [sum]")],
    # Case 4.
    "query or a cache is read before all that the op reads is made": [
        ("[ks]", "[early] z = Neg(query) [late] pk_ = Neg(pk) [ks]"),
        ("(pk, kt", "(pk_, kt"),
    ],
}
MORE = {"z = Neg(kt)": ", float[B,2,N,8] z", "z = Neg(pk)": ", float[B,2,16,8] z", "z = Neg(q": ", float[B,4,N,8] z"}


@pytest.mark.parametrize("why", REFUSED)
def test_another_form_is_left_as_it_is(why: str) -> None:
    nodes = changed(*REFUSED[why])
    made = graph(nodes, next((more for what, more in MORE.items() if what in nodes), ""))
    before = ops(made)
    assert fuse_cache_write(made) == Fused(1, [("op", why)])
    # The second layer alone is another.
    second = before.index("QkNormRope", before.index("QkNormRope") + 1)
    assert [op for op in ops(made) if op not in ("Cast", "QkNormRopeWrite")] == [
        op for i, op in enumerate(before) if i not in range(second, second + 3)
    ]


# Case 1.
def test_refuses_keys_that_are_an_output_too() -> None:
    made = graph(PLAIN, ", float[B,2,N,8] kt")
    assert fuse_cache_write(made).refused == [("op", "key is not only written into slots")]


# Case 3.
@pytest.mark.parametrize("field", [{"dtype": np.dtype(np.float16)}, {"shape": None}])
def test_refuses_pasts_of_another_type_or_of_no_known_shape(field: dict[str, object]) -> None:
    made = graph(PLAIN)
    past = next(v for v in made.inputs if v.name == "pv")
    for name, value in field.items():
        setattr(past, name, value)
    assert fuse_cache_write(made).refused == [("op", "its pasts are not [B, heads, S, D] of its float type")]


def test_a_second_run_finds_no_more() -> None:
    made = graph(PLAIN)
    fuse_cache_write(made)
    assert fuse_cache_write(made) == Fused(0, [])
