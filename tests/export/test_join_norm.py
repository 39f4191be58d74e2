"""MoeExperts, what a shared expert adds to it and the norm of their sum become one node, where a plugin computes it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.helper import get_node_attr_value
from onnx.parser import parse_model
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from llmexport.export.join_norm import join_norms
from llmexport.plugins.normed import ADDENDS, GATE_COLUMN, inputs_of
from llmexport.plugins.spec import all_ops

HEADER = '<ir_version: 10, opset_import: ["" : 23, "llmexport" : 2]>'
SERVED = frozenset({*all_ops(), *ADDENDS})
C = 4
ROW = f"float[1, 2, {C}]"
SAYS = {"experts": "<group = 7>", "norm": "<epsilon = 0.5>"}


class MoeExperts(OpRun):
    op_domain = "llmexport"

    def _run(self, x: np.ndarray, *rest: np.ndarray, **_: Any) -> tuple[np.ndarray]:
        return (x * sum(i * r.sum() for i, r in enumerate(rest, 1)),)


class AddRmsNorm(OpRun):
    op_domain = "llmexport"

    def _run(
        self, x: np.ndarray, residual: np.ndarray, weight: np.ndarray, *inner: np.ndarray, **_: Any
    ) -> tuple[np.ndarray, ...]:
        total = (x * inner[0] if inner else x) + residual
        return total * weight, total


def _normed(name: str) -> type[OpRun]:
    """The same of a plugin's inputs, in their order."""
    experts = [*all_ops()["MoeExperts"].inputs]

    class Normed(OpRun):
        op_domain = "llmexport"

        def _run(self, *given: np.ndarray, group: int, epsilon: float, **said: int) -> tuple[np.ndarray, ...]:
            assert (group, epsilon) == (7, 0.5)
            tensors = dict(zip(inputs_of(name, experts), given, strict=False))
            [y] = MoeExperts._run(self, *(tensors[n] for n in experts if n in tensors))
            shared = tensors.get("shared", np.float32(0))
            if "shared_gate" in tensors:
                column = said[GATE_COLUMN]
                shared = shared / (1 + np.exp(-tensors["shared_gate"][..., column : column + 1]))
            return AddRmsNorm._run(self, y + shared, tensors["residual"], tensors["norm_weight"])

    Normed.__name__ = name
    return Normed


EVALUATED = [MoeExperts, AddRmsNorm, *map(_normed, ADDENDS)]


def model_of(body: str, outputs: str = f"{ROW} n, {ROW} s") -> onnx.ModelProto:
    """Of x, the residual r, the shared expert's z, all [1, 2, C], and a product t [1, 2, 3] with a gate in it."""
    shapes = f"<{ROW} y, {ROW} a, {ROW} m, {ROW} q, float[1, 2, 1] g, float[1, 2, 1] f, float[{C}] v>"
    given = f"{ROW} x, {ROW} r, {ROW} z, float[1, 2, 3] t"
    model = parse_model(f"{HEADER} m ({given}) => ({outputs}) {shapes} {{ {body} }}")
    random = np.random.default_rng(0)
    for name, shape in {"w": (3,), "e": (2,), "gu": (2, 3), "d": (2,), "b": (5,), "k": (C,), "k2": (C,)}.items():
        model.graph.initializer.append(numpy_helper.from_array(random.standard_normal(shape).astype(np.float32), name))
    for name, value in {"zero": 0, "one": 1, "two": 2, "last": -1, "before": -2}.items():
        model.graph.initializer.append(numpy_helper.from_array(np.array([value]), name))
    for i, node in enumerate(model.graph.node):
        node.name = f"node_{i}"
    return model


def joined(model: onnx.ModelProto, served: frozenset[str] = SERVED) -> Counter[str]:
    """Joins it, checks that it computes the same, and returns its operators."""
    random = np.random.default_rng(1)
    feed = {
        v.name: random.standard_normal([d.dim_value for d in v.type.tensor_type.shape.dim]).astype(np.float32)
        for v in model.graph.input
    }
    want = ReferenceEvaluator(model, new_ops=EVALUATED).run(None, feed)
    left = join_norms(model, {n.name: n.op_type for n in model.graph.node if n.domain}, served)
    assert left == {n.name: n.op_type for n in model.graph.node if n.domain}
    found = ReferenceEvaluator(model, new_ops=EVALUATED).run(None, feed)
    for a, b in zip(want, found, strict=True):
        assert np.abs(a - b).max() <= 1e-6 * np.abs(a).max()
    known = {t.name for t in model.graph.initializer} | {v.name for v in model.graph.input}
    for node in model.graph.node:
        assert known.issuperset(node.input), node.name
        known.update(node.output)
    return Counter(n.op_type for n in model.graph.node)


EXPERTS = f"y = llmexport.MoeExperts {SAYS['experts']} (x, w, e, gu, d) "
NORM = f"n, s = llmexport.AddRmsNorm {SAYS['norm']} "
ADD = "a = Add (y, z) "
GATE = "g = Slice (t, one, two, last) f = Sigmoid (g) m = Mul (f, z) a = Add (y, m) "


@pytest.mark.parametrize("order", ["(y, r, k)", "(r, y, k)"])
def test_experts_and_their_norm_become_one(order: str) -> None:
    model = model_of(EXPERTS + NORM + order)
    assert joined(model) == {"NormedMoeExperts": 1}
    [node] = model.graph.node
    assert (node.name, node.domain) == ("node_0", "llmexport")
    assert [*node.input] == ["x", "w", "e", "gu", "d", "r", "k"]


def test_inputs_that_may_be_left_out_come_last() -> None:
    model = model_of(EXPERTS.replace("d)", "d, b, k)") + ADD + NORM + "(a, r, k)")
    assert joined(model) == {"NormedSharedMoeExperts": 1}
    assert [*model.graph.node[0].input] == ["x", "w", "e", "gu", "d", "r", "k", "z", "b", "k"]


@pytest.mark.parametrize("add", [ADD, "a = Add (z, y) "])
@pytest.mark.parametrize("order", ["(a, r, k)", "(r, a, k)"])
def test_what_a_shared_expert_made_is_added_too(add: str, order: str) -> None:
    assert joined(model_of(EXPERTS + add + NORM + order)) == {"NormedSharedMoeExperts": 1}


@pytest.mark.parametrize("mul", ["Mul (f, z)", "Mul (z, f)"])
def test_a_gate_is_read_where_it_lies(mul: str) -> None:
    model = model_of(EXPERTS + GATE.replace("Mul (f, z)", mul) + NORM + "(r, a, k)")
    assert joined(model) == {"NormedGatedSharedMoeExperts": 1}
    [node] = model.graph.node
    assert (node.input[8], get_node_attr_value(node, GATE_COLUMN)) == ("t", 1)
    assert not {"one", "two", "last"} & {t.name for t in model.graph.initializer}


GATES = {
    "a gate that is no column of another": ("g = ReduceSum <keepdims = 1> (t, last) ", {"ReduceSum": 1}),
    "a column that others read": ("g = Slice (t, one, two, last) ", {"Slice": 1, "Neg": 1}),
    "a part of another axis": (
        "h = Transpose <perm = [2, 1, 0]> (t) g = Slice (h, one, two, zero) ",
        {"Transpose": 1, "Slice": 1},
    ),
    "a column from behind": ("g = Slice (t, before, last, last) ", {"Slice": 1}),
}


@pytest.mark.parametrize("name", GATES)
def test_other_gates_are_read_too(name: str) -> None:
    made, left = GATES[name]
    outputs = f"{ROW} n, {ROW} s" + (", float[1, 2, 1] o" if "others" in name else "")
    body = EXPERTS + made + GATE.partition("last) ")[2] + NORM + "(r, a, k)" + (" o = Neg (g)" if "Neg" in left else "")
    assert joined(model_of(body, outputs)) == {"NormedGatedSharedMoeExperts": 1, **left}


LESS = {
    "a sigmoid that others read": (GATE + NORM + "(r, a, k) o = Neg (f)", "float[1, 2, 1] o"),
    "a product that others read": (GATE + NORM + "(r, a, k) o = Neg (m)", f"{ROW} o"),
    "a sigmoid that is an output": (GATE + NORM + "(r, a, k)", "float[1, 2, 1] f"),
    "a product that is an output": (GATE + NORM + "(r, a, k)", f"{ROW} m"),
    "a gate of each column": ("q = Sigmoid (z) m = Mul (q, z) a = Add (y, m) " + NORM + "(r, a, k)", f"{ROW} n"),
}


@pytest.mark.parametrize("name", LESS)
def test_where_no_gate_can_be_joined_its_product_is_what_is_added(name: str) -> None:
    body, output = LESS[name]
    found = joined(model_of(EXPERTS + body, f"{ROW} s, {output}"))
    assert (found["NormedSharedMoeExperts"], found["Sigmoid"], found["Mul"]) == (1, 1, 1)


def test_a_library_without_a_plugin_leaves_what_it_would_join() -> None:
    body = EXPERTS + GATE + NORM + "(r, a, k)"
    assert joined(model_of(body), SERVED - {"NormedGatedSharedMoeExperts"})["NormedSharedMoeExperts"] == 1


def test_layers_are_joined_one_after_another() -> None:
    first = EXPERTS + NORM.replace("n, s", "p, u") + "(y, r, k) "
    second = "i = llmexport.MoeExperts <group = 7> (p, w, e, gu, d) " + NORM + "(u, i, k)"
    model = model_of(first + second)
    assert joined(model) == {"NormedMoeExperts": 2}


LEFT = {
    "experts that are an output": (EXPERTS + NORM + "(y, r, k)", f"{ROW} n, {ROW} y", SERVED),
    "experts that others read": (EXPERTS + NORM + "(y, r, k) o = Neg (y)", f"{ROW} n, {ROW} o", SERVED),
    "experts that a branch reads": (
        *(EXPERTS + NORM + "(y, r, k) h = ReduceSum <keepdims = 0> (r) c = Cast <to = 9> (h) ",),
        *(f"{ROW} n, {ROW} o", SERVED),
    ),
    "experts that are their own residual": (EXPERTS + NORM + "(y, y, k)", f"{ROW} n", SERVED),
    "experts that are added to themselves": (EXPERTS + "a = Add (y, y) " + NORM + "(a, r, k)", f"{ROW} n", SERVED),
    "a sum that others read": (EXPERTS + ADD + NORM + "(a, r, k) o = Neg (a)", f"{ROW} n, {ROW} o", SERVED),
    "a sum that is an output": (EXPERTS + ADD + NORM + "(a, r, k)", f"{ROW} n, {ROW} a", SERVED),
    "what is added to all rows": (EXPERTS + "a = Add (y, b2) " + NORM + "(a, r, k)", f"{ROW} n", SERVED),
    "what is added of unknown shape": (
        *(EXPERTS + "o = Neg (z) a = Add (y, o) " + NORM + "(a, r, k)", f"{ROW} n", SERVED),
    ),
    "a norm of what is added": (EXPERTS + NORM + "(y, r, k, k2)", f"{ROW} n", SERVED),
    "another operator between": (EXPERTS + "a = Sub (y, z) " + NORM + "(a, r, k)", f"{ROW} n", SERVED),
    "a norm of something else": (EXPERTS + "o = Neg (y) " + NORM + "(o, r, k)", f"{ROW} n", SERVED),
    "a library without plugins": (EXPERTS + NORM + "(y, r, k)", f"{ROW} n", frozenset(all_ops())),
}
BRANCHES = f"o = If (c) <then_branch = p () => ({ROW} p1) {{ p1 = Neg (y) }}, "
BRANCHES += f"else_branch = p () => ({ROW} p2) {{ p2 = Abs (y) }}>"


@pytest.mark.parametrize("name", LEFT)
def test_what_no_plugin_computes_stays(name: str) -> None:
    body, outputs, served = LEFT[name]
    model = model_of(body + (BRANCHES if "branch" in name else ""), outputs)
    model.graph.initializer.append(numpy_helper.from_array(np.ones(C, np.float32), "b2"))
    before = Counter(n.op_type for n in model.graph.node)
    assert joined(model, served) == before
