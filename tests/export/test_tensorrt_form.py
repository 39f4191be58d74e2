"""What TensorRT is given in place of the model computes the same, and is refused where it would not."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from first_feed import first_feed
from one_node import model_of, session
from onnx import TensorProto, helper
from onnx.helper import make_function, make_node, make_opsetid
from onnx.reference import ReferenceEvaluator

from llmexport.export import manifest
from llmexport.export.errors import EngineError
from llmexport.export.tensorrt_form import tensorrt_form
from llmexport.validate import runners, stages
from llmexport.validate.compare import compare
from llmexport.validate.tolerance import TOLERANCE


@pytest.mark.parametrize("arch", ["gemma", "llama4"])
def test_the_form_computes_what_the_model_computes(arch: str, exported) -> None:
    folder = exported(arch)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    form = tensorrt_form(model)[0]
    assert model.functions
    assert not form.functions
    assert not [n for n in form.graph.node if n.op_type == "Attention"]
    read_back = manifest.read(folder)
    feed = first_feed(read_back.graphs[0], stages.prompt(read_back))
    outputs = []
    for proto in (model, form):
        with runners.onnx_runner(proto, folder) as runner:
            outputs.append(dict(runner.infer(feed)))
    wanted, found = outputs
    assert list(wanted) == list(found)
    # Attention is written out, in float32: other sums, the same values.
    assert max(compare(wanted[n], found[n]).excess(TOLERANCE["float32"]) for n in wanted) <= 1


def test_an_engine_gets_plugins_that_an_export_for_no_target_has_not(exported) -> None:
    model = onnx.load(exported("gemma") / "model.onnx", load_external_data=False)
    served = frozenset(["Rope", "QkNormRope", "GatedDeltaNet"])
    before, after = (Counter(tensorrt_form(model, s)[1].values()) for s in (frozenset(["Rope"]), served))
    assert (before, after) == ({"Rope": 6}, {"QkNormRope": 3})


@pytest.mark.parametrize("arch", ["qwen3_moe", "openelm"])
def test_no_weight_in_a_file_is_read_for_that(arch: str, exported) -> None:
    """Norms of q and k in another type than these, where a constant of the model itself would be narrowed."""
    folder = exported(arch, "bfloat16")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in (e for e in tensor.external_data if e.key == "location"):
            entry.value = f"nowhere/{entry.value}"
    assert {*tensorrt_form(model, frozenset(["Rope", "QkNormRope"]))[1].values()} == {"QkNormRope"}


def attention_model(element: int, q_heads: int, kv_heads: int, depth: int, value_depth: int) -> onnx.ModelProto:
    shapes = {
        "q": ["B", q_heads, "T", depth],
        "k": ["B", kv_heads, "S", depth],
        "v": ["B", kv_heads, "S", value_depth],
        "mask": ["B", 1, "T", "S"],
        "y": ["B", q_heads, "T", value_depth],
    }
    types = {n: TensorProto.BOOL if n == "mask" else element for n in shapes}
    *inputs, y = [helper.make_tensor_value_info(n, types[n], d) for n, d in shapes.items()]
    node = make_node("Attention", ["q", "k", "v", "mask"], ["y"], "attention", scale=0.3)
    graph = helper.make_graph([node], "one", inputs, [y])
    return helper.make_model(graph, opset_imports=[make_opsetid("", 23)], ir_version=10)


@pytest.mark.parametrize(("q_heads", "kv_heads", "value_depth"), [(4, 4, 8), (6, 2, 8), (4, 1, 12)])
def test_float32_attention_is_written_out(q_heads: int, kv_heads: int, value_depth: int) -> None:
    model = attention_model(TensorProto.FLOAT, q_heads, kv_heads, 8, value_depth)
    form = tensorrt_form(model)[0]
    assert {n.op_type for n in form.graph.node} >= {"MatMul", "Softmax"}
    random = np.random.default_rng(0)
    sizes = {"q": (2, q_heads, 5, 8), "k": (2, kv_heads, 7, 8), "v": (2, kv_heads, 7, value_depth)}
    given = {n: random.standard_normal(s, np.float32) for n, s in sizes.items()}
    given["mask"] = random.random((2, 1, 5, 7)) < 0.5
    given["mask"][..., 3] = True
    (wanted,) = ReferenceEvaluator(model).run(None, given)
    (found,) = session(form).run(None, given)
    assert compare(wanted, found).excess(TOLERANCE["float32"]) <= 1
    given["mask"][1, 0, 2] = False
    (found,) = session(form).run(None, given)
    mean = np.repeat(given["v"][1].astype(np.float64).mean(1), q_heads // kv_heads, axis=0)
    assert compare(mean, found[1, :, 2]).excess(TOLERANCE["float32"]) <= 1


def test_attention_in_16_bit_stays() -> None:
    model = attention_model(TensorProto.FLOAT16, 4, 2, 8, 8)
    assert tensorrt_form(model)[0].graph.node == model.graph.node


def test_attention_that_cannot_be_read_is_not_written_out_either() -> None:
    model = attention_model(TensorProto.FLOAT, 4, 2, 8, 8)
    model.graph.node[0].attribute.append(helper.make_attribute("softcap", 5.0))
    with pytest.raises(EngineError, match="ignores softcap of Attention"):
        tensorrt_form(model)


@pytest.mark.parametrize(
    ("served", "operators", "plugins"),
    [(frozenset[str](), ["Relu", "Neg"], {}), (frozenset({"F"}), ["F", "F"], {"one": "F", "two": "F"})],
)
def test_two_bodies_of_one_op_are_inlined_apart_or_left_to_one_plugin(served, operators, plugins) -> None:
    opsets = [make_opsetid("", 23), make_opsetid("llmexport", 1)]
    bodies = [
        make_function("llmexport", f"F__{op}", ["x"], ["y"], [make_node(op, ["x"], ["y"])], opsets[:1])
        for op in ("Relu", "Neg")
    ]
    calls = [
        make_node("F__Relu", ["a"], ["b"], "one", domain="llmexport"),
        make_node("F__Neg", ["b"], ["c"], "two", domain="llmexport"),
    ]
    form, left = tensorrt_form(model_of(calls, ["a"], ["c"], opsets, bodies), served)
    assert ([n.op_type for n in form.graph.node], left, len(form.functions)) == (operators, plugins, 0)


@pytest.mark.parametrize(("imported", "taken"), [(1, False), (2, True)])
def test_a_plugin_takes_no_op_of_an_earlier_version(imported: int, taken: bool) -> None:
    """SinkAttention of version 1 has heads before tokens in its result; its body in the graph has it too."""
    opsets = [make_opsetid("", 23), make_opsetid("llmexport", imported)]
    body = make_function("llmexport", "SinkAttention__x", ["x"], ["y"], [make_node("Neg", ["x"], ["y"])], opsets[:1])
    model = model_of([make_node(body.name, ["a"], ["b"], "n", domain="llmexport")], ["a"], ["b"], opsets, [body])
    assert [n.op_type for n in tensorrt_form(model)[0].graph.node] == ["Neg"]
    served = frozenset({"SinkAttention"})
    if taken:
        form, left = tensorrt_form(model, served)
        assert ([(a.name, a.s) for a in form.graph.node[0].attribute], left) == (
            [("plugin_version", b"2")],
            {"n": "SinkAttention"},
        )
        return
    says = "n is SinkAttention of version 1 or earlier, its plugin of version 2: export the model again"
    with pytest.raises(EngineError, match=f"^{says}$"):
        tensorrt_form(model, served)


def test_bytes_that_only_plugins_read_become_int8() -> None:
    """TensorRT gives plugins no uint8."""
    nodes = [
        make_node("F", ["a", "own", "shared"], ["b"], "n", domain="llmexport"),
        make_node("Cast", ["shared"], ["c"], to=TensorProto.FLOAT),
    ]
    model = model_of(nodes, ["a"], ["b", "c"])
    values = bytes([0, 127, 128, 255])
    for name in ("own", "shared"):
        model.graph.initializer.append(helper.make_tensor(name, TensorProto.UINT8, [4], values, raw=True))
    form, plugins = tensorrt_form(model, frozenset({"F"}))
    assert plugins == {"n": "F"}
    assert {w.name: (w.data_type, w.raw_data) for w in form.graph.initializer} == {
        "own": (TensorProto.INT8, values),
        "shared": (TensorProto.UINT8, values),
    }


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        (make_node("F", ["a"], ["b"], "n", domain="llmexport"), "n: llmexport::F has no body"),
        (make_node("Attention", ["a", "a", "a"], ["b"], "n", is_causal=1), "ignores is_causal of Attention"),
        (make_node("Attention", ["a", "a", "a"], ["b"], "n", softcap=5.0), "ignores softcap of Attention"),
        (make_node("Attention", ["a"] * 3 + [""] * 3 + ["k"], ["b"], "n"), "ignores k of Attention"),
    ],
)
def test_refuses_what_tensorrt_would_misread(node: onnx.NodeProto, reason: str) -> None:
    with pytest.raises(EngineError, match=reason):
        tensorrt_form(model_of([node], ["a"], ["b"]))
