"""Parts cut out of a finished graph."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from llmexport.export.graph_file import load_body
from llmexport.graphs.bodies import attach_bodies
from llmexport.graphs.cut import cut, needed


def value(name: str, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


@pytest.fixture(params=[["w"], ["w", "w"]], ids=["", "with a norm of x"])
def model(request: pytest.FixtureRequest) -> onnx.ModelProto:
    """x, r -> AddRmsNorm -> y, sum; out = y * y + sum; other = -x"""
    attributes = {"epsilon": 1e-6, "weight_offset": 0.0, "round_before_weight": 1}
    nodes = [
        helper.make_node("AddRmsNorm", ["x", "r", *request.param], ["y", "sum"], domain="llmexport", **attributes),
        helper.make_node("Mul", ["y", "y"], ["square"]),
        helper.make_node("Add", ["square", "sum"], ["out"]),
        helper.make_node("Neg", ["x"], ["other"]),
    ]
    shape = (1, "t", 4)
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", *shape), value("r", *shape)],
        [value("out", *shape), value("other", *shape)],
        [onnx.numpy_helper.from_array(np.array([1, 2, 3, 4], np.float32), "w")],
        value_info=[value("y", *shape), value("sum", *shape), value("square", *shape)],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("llmexport", 1)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    attach_bodies(made, load_body)
    return made


def run(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feed)


def test_keeps_only_what_the_outputs_need(model) -> None:
    part = cut(model, [value("x", 1, "t", 4)], ["other"])
    assert [n.op_type for n in part.graph.node] == ["Neg"]
    assert not part.graph.initializer
    assert not part.functions


def test_cuts_through_a_fused_norm_by_its_sum(model) -> None:
    x, r = np.random.default_rng(0).standard_normal((2, 1, 3, 4), np.float32)
    part = cut(model, [value("sum", 1, "t", 4)], ["out"])
    model.graph.output.append(value("sum", 1, "t", 4))
    whole, _, total = run(model, {"x": x, "r": r})
    assert np.array_equal(run(part, {"sum": total})[0], whole)


def test_an_output_that_needs_more_than_is_given_is_refused(model) -> None:
    with pytest.raises(ValueError, match="needs x"):
        cut(model, [value("r", 1, "t", 4)], ["out"])


def test_leaves_the_model_as_it_was(model) -> None:
    before = model.SerializeToString(deterministic=True)
    cut(model, [value("sum", 1, "t", 4)], ["out"])
    assert model.SerializeToString(deterministic=True) == before


def test_keeps_what_branches_read_from_outside() -> None:
    shape = (1, "t", 4)
    branches = {
        f"{side}_branch": helper.make_graph(
            [helper.make_node(op, ["doubled", name], [side])], side, [], [value(side, *shape)]
        )
        for side, op, name in (("then", "Mul", "w"), ("else", "Add", "x"))
    }
    nodes = [
        helper.make_node("Add", ["x", "x"], ["doubled"]),
        helper.make_node("Neg", ["x"], ["other"]),
        helper.make_node("If", ["which"], ["out"], **branches),
    ]
    inputs = [value("x", *shape), helper.make_tensor_value_info("which", TensorProto.BOOL, ())]
    held = [onnx.numpy_helper.from_array(np.array([1, 2, 3, 4], np.float32), "w")]
    graph = helper.make_graph(nodes, "g", inputs, [value("out", *shape), value("other", *shape)], held)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    part = cut(made, inputs, ["out"])
    assert [n.op_type for n in part.graph.node] == ["Add", "If"]
    assert [t.name for t in part.graph.initializer] == ["w"]
    x = np.ones((1, 3, 4), np.float32)
    for which in (True, False):
        feed = {"x": x, "which": np.array(which)}
        assert np.array_equal(run(part, feed)[0], run(made, feed)[0])
    with pytest.raises(ValueError, match="the cut needs x"):
        cut(made, inputs[1:], ["out"])


def test_nodes_that_are_needed_stand_behind_what_they_read() -> None:
    made = {"sum": ("Add", ["a", "b"]), "b": ("Neg", ["a"]), "unread": ("Neg", ["sum"]), "a": ("Abs", ["x"])}
    nodes = [helper.make_node(kind, inputs, [name], name) for name, (kind, inputs) in made.items()]
    assert [n.name for n in needed(nodes, ["sum"])] == ["a", "b", "sum"]
    assert [n.name for n in needed(nodes, ["x"])] == []


def test_what_a_branch_reads_is_needed_too() -> None:
    branch = helper.make_graph([helper.make_node("Neg", ["a"], ["c"])], "branch", [], [value("c")])
    choice = helper.make_node("If", ["x"], ["y"], "choice", then_branch=branch, else_branch=branch)
    nodes = [choice, helper.make_node("Abs", ["x"], ["a"], "abs")]
    assert [n.name for n in needed(nodes, ["y"])] == ["abs", "choice"]
