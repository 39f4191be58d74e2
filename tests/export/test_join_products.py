"""Products by weights of one tensor become one, where plugins can read its result as it lies."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.parser import parse_model
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from llmexport.export.join_products import join_products
from llmexport.plugins.joined import BIASABLE, BIASED, COLUMNS, JOINED, parts_of
from llmexport.plugins.spec import all_ops

OPS = {name: op for name, op in all_ops().items() if op.joins}
SERVED = frozenset({*OPS, *(f"{JOINED}{name}" for name in OPS), *(f"{BIASED}{JOINED}{name}" for name in BIASABLE)})
HEADER = '<ir_version: 10, opset_import: ["" : 23, "llmexport" : 2]>'
K = 6


class GatedAct(OpRun):
    op_domain = "llmexport"

    def _run(self, gate: np.ndarray, up: np.ndarray, **_: Any) -> tuple[np.ndarray]:
        return (gate * (1 + up),)


class MoeRoute(OpRun):
    op_domain = "llmexport"

    def _run(self, logits: np.ndarray, **_: Any) -> tuple[np.ndarray, ...]:
        return logits * 2, logits.argsort(-1).astype(np.int32)


class QkNormRope(OpRun):
    op_domain = "llmexport"

    def _run(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, *_: np.ndarray, **__: Any) -> tuple[np.ndarray, ...]:
        return tuple(np.swapaxes(x, 1, 2) * i for i, x in enumerate((q, k, v), 1))


def _joined(kind: type[OpRun]) -> type[OpRun]:
    """The same of columns, as parts_of reads them."""

    class Joined(OpRun):
        op_domain = "llmexport"

        def _run(self, x: np.ndarray, *rest: np.ndarray, columns: list[int], **_: Any) -> tuple[np.ndarray, ...]:
            op = OPS[kind.__name__]
            parts = {p.name: p for p in parts_of(op.inputs, op.joins, columns)}
            others = iter(rest)
            given = [
                x[..., parts[n].first : parts[n].end].reshape(*x.shape[:2], *parts[n].sizes)
                if n in parts
                else next(others, None)
                for n in op.inputs
            ]
            return kind._run(self, *(g for g in given if g is not None))

    Joined.__name__ = f"{JOINED}{kind.__name__}"
    return Joined


class QkNormRopeWrite(QkNormRope):
    """Of which k and v are the caches."""


def _biased(kind: type[OpRun]) -> type[OpRun]:
    """The same with a bias, which it adds first."""

    class Biased(_joined(kind)):
        def _run(self, x: np.ndarray, bias: np.ndarray, *rest: np.ndarray, **said: Any) -> tuple[np.ndarray, ...]:
            return super()._run(x + bias, *rest, **said)

    Biased.__name__ = f"{BIASED}{JOINED}{kind.__name__}"
    return Biased


KINDS = [GatedAct, MoeRoute, QkNormRope, QkNormRopeWrite]
EVALUATED = [*KINDS, *map(_joined, KINDS), _biased(QkNormRopeWrite)]


def model_of(body: str, outputs: str, **weights: tuple[int, ...]) -> onnx.ModelProto:
    """Of x [1, 2, K], with random weights."""
    model = parse_model(f"{HEADER} m (float[1, 2, {K}] x) => ({outputs}) {{ {body} }}")
    random = np.random.default_rng(0)
    for name, shape in weights.items():
        values = random.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    for name, heads in {"to_2": (2, 4), "to_1": (1, 4), "flat": (2, 4)}.items():
        ahead = [0, 0] if name != "flat" else [-1, 1]
        model.graph.initializer.append(numpy_helper.from_array(np.array([*ahead, *heads]), name))
    for i, node in enumerate(model.graph.node):
        node.name = node.name or f"node_{i}"
    return model


def joined(model: onnx.ModelProto, served: frozenset[str] = SERVED) -> Counter[str]:
    """Joins it, checks that it computes the same, and returns its operators."""
    feed = {"x": np.random.default_rng(1).standard_normal((1, 2, K)).astype(np.float32)}
    want = ReferenceEvaluator(model, new_ops=EVALUATED).run(None, feed)
    join_products(model, served, [], Path())
    found = ReferenceEvaluator(model, new_ops=EVALUATED).run(None, feed)
    for a, b in zip(want, found, strict=True):
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= 1e-6 * np.abs(a).max()
    known = {t.name for t in model.graph.initializer} | {"x", ""}
    for node in model.graph.node:
        assert known.issuperset(node.input), node.name
        known.update(node.output)
    return Counter(n.op_type for n in model.graph.node)


MLP = "g = MatMul (x, w) u = MatMul (x, w2) y = llmexport.GatedAct (g, u)"
QKV = "q = MatMul (x, w) k = MatMul (x, w2) v = MatMul (x, w3) {} qh = Reshape ({}, to_2) kh = Reshape ({}, to_1) "
QKV += "vh = Reshape ({}, to_1) y, yk, yv = llmexport.QkNormRope (qh, kh, vh, c, c)"
PLAIN = QKV.format("", "q", "k", "v")
QKV_WEIGHTS = {"w": (K, 8), "w2": (K, 4), "w3": (K, 4), "c": (1, 2, 2)}


def test_gate_and_up_become_one() -> None:
    model = model_of(MLP, "float[1, 2, 8] y", w=(K, 8), w2=(K, 8))
    assert joined(model) == {"Concat": 1, "MatMul": 1, "JoinedGatedAct": 1}
    act = next(n for n in model.graph.node if n.op_type == "JoinedGatedAct")
    assert onnx.helper.get_node_attr_value(act, COLUMNS) == [0, 8, 8, 8]


def test_heads_are_columns_too() -> None:
    model = model_of(PLAIN, "float[1, 2, 2, 4] y, float[1, 1, 2, 4] yk, float[1, 1, 2, 4] yv", **QKV_WEIGHTS)
    assert joined(model) == {"Concat": 1, "MatMul": 1, "JoinedQkNormRope": 1}


@pytest.mark.parametrize("biased", [c for n in range(1, 4) for c in itertools.combinations("qkv", n)])
def test_biases_are_joined_with_zeros_for_those_that_are_not_there(biased: tuple[str, ...]) -> None:
    adds = " ".join(f"{n}b = Add ({n}, b{n})" for n in biased)
    body = QKV.format(adds, *(f"{n}b" if n in biased else n for n in "qkv"))
    biases = {f"b{n}": (8 if n == "q" else 4,) for n in biased}
    model = model_of(body, "float[1, 2, 2, 4] y, float[1, 1, 2, 4] yk", **QKV_WEIGHTS, **biases)
    assert joined(model) == {"Concat": 2, "MatMul": 1, "Add": 1, "JoinedQkNormRope": 1}


WRITTEN = QKV.replace("QkNormRope (qh, kh, vh, c, c)", "QkNormRopeWrite (qh, kh, vh, c, c, p, p, i)")
WRITTEN = WRITTEN.format("qb = Add (q, bq)", "qb", "k", "v")
WRITTEN_WEIGHTS = {**QKV_WEIGHTS, "bq": (8,), "p": (1, 1, 2, 4), "i": (1,)}


def test_a_plugin_adds_the_bias_that_nothing_else_reads() -> None:
    """With zeros for those that are not there."""
    model = model_of(WRITTEN, "float[1, 2, 2, 4] y, float[1, 1, 2, 4] yk", **WRITTEN_WEIGHTS)
    assert joined(model) == {"Concat": 1, "MatMul": 1, "BiasedJoinedQkNormRopeWrite": 1}
    node = next(n for n in model.graph.node if n.domain)
    assert [*node.input[2:]] == ["c", "c", "p", "p", "i"]
    assert node.input[1] in {t.name for t in model.graph.initializer}


@pytest.mark.parametrize(
    ("more", "served", "left"),
    [
        ("z = Neg (qb)", SERVED, {"Add": 1, "Slice": 1, "Neg": 1}),
        ("z = Neg (v)", SERVED, {"Add": 1, "Slice": 1, "Neg": 1}),
        ("r = MatMul (x, wr) z, ri = llmexport.MoeRoute (r)", SERVED, {"Add": 1, "JoinedMoeRoute": 1}),
        ("z = Neg (x)", SERVED - {"BiasedJoinedQkNormRopeWrite"}, {"Add": 1, "Neg": 1}),
    ],
)
def test_a_bias_that_others_read_too_is_added_before(more: str, served: frozenset[str], left: dict[str, int]) -> None:
    weights = {**WRITTEN_WEIGHTS, "wr": (K, 8)}
    model = model_of(f"{WRITTEN} {more}", "float[1, 2, 2, 4] y, float[1, 2, N] z", **weights)
    assert joined(model, served) == {"Concat": 2, "MatMul": 1, "JoinedQkNormRopeWrite": 1, **left}


def test_a_weight_may_be_turned_and_cast() -> None:
    body = "wt = Transpose <perm = [1, 0]> (w) wd = Cast <to = 11> (w2) wc = Cast <to = 1> (w2) "
    body += "g = MatMul (x, wt) u = MatMul (x, wc) y = llmexport.GatedAct (g, u)"
    assert joined(model_of(body, "float[1, 2, 8] y", w=(8, K), w2=(K, 8)))["JoinedGatedAct"] == 1


CAST = {
    "biases": (
        "bc = Cast <to = 1> (b) b2c = Cast <to = 1> (b2) m = MatMul (x, w) g = Add (m, bc) n = MatMul (x, w2) "
        "u = Add (n, b2c)",
        {"w": (K, 8), "w2": (K, 8), "b": (8,), "b2": (8,)},
    ),
    "rows": (
        "bc = Cast <to = 1> (b) b2c = Cast <to = 1> (b2) t = Transpose (bc) t2 = Transpose (b2c) g = MatMul (x, t) "
        "u = MatMul (x, t2)",
        {"b": (8, K), "b2": (8, K)},
    ),
}


@pytest.mark.parametrize("name", CAST)
def test_weights_may_be_cast_from_one_type_each(name: str) -> None:
    body, weights = CAST[name]
    model = model_of(f"{body} y = llmexport.GatedAct (g, u)", "float[1, 2, 8] y", **weights)
    for tensor in model.graph.initializer:
        if kind := {"b": np.float16, "b2": np.float64}.get(tensor.name):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(kind), tensor.name))
    assert joined(model)["JoinedGatedAct"] == 1
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)


def test_a_weight_may_be_turned_twice() -> None:
    body = "a = Transpose (w) b = Transpose (a) c = Transpose (w2) d = Transpose (c) g = MatMul (x, b) "
    body += "u = MatMul (x, d) y = llmexport.GatedAct (g, u)"
    assert joined(model_of(body, "float[1, 2, 8] y", w=(K, 8), w2=(K, 8)))["JoinedGatedAct"] == 1


def test_all_products_of_a_tensor_are_joined_and_others_read_a_slice() -> None:
    """A narrow one comes last, and zeros fill the last vector."""
    body = "s = MatMul (x, ws) r = MatMul (x, wr) e, i = llmexport.MoeRoute (r) " + MLP + " z = Sigmoid (s)"
    weights = {"ws": (K, 1), "wr": (K, 4), "w": (K, 8), "w2": (K, 8)}
    model = model_of(body, "float[1, 2, 8] y, float[1, 2, 4] e, int32[1, 2, 4] i, float[1, 2, 1] z", **weights)
    found = joined(model)
    assert found == {"Concat": 1, "MatMul": 1, "JoinedGatedAct": 1, "JoinedMoeRoute": 1, "Slice": 1, "Sigmoid": 1}
    said = {n.op_type: onnx.helper.get_node_attr_value(n, COLUMNS) for n in model.graph.node if n.domain}
    assert said == {"JoinedMoeRoute": [0, 4], "JoinedGatedAct": [4, 8, 12, 8]}
    shape = onnx.shape_inference.infer_shapes(model).graph.value_info
    [width] = [v.type.tensor_type.shape.dim[2].dim_value for v in shape if v.name.endswith("joined")]
    assert width == 24


def test_what_is_an_output_or_is_read_twice_is_still_there() -> None:
    body = MLP + " z = Neg (g)"
    assert joined(model_of(body, "float[1, 2, 8] y, float[1, 2, 8] z, float[1, 2, 8] u", w=(K, 8), w2=(K, 8))) == {
        "Concat": 1,
        "MatMul": 1,
        "JoinedGatedAct": 1,
        "Neg": 1,
        "Slice": 2,
    }


def test_a_value_that_a_branch_reads_is_still_there() -> None:
    body = MLP + " t = ReduceSum <keepdims = 0> (y) f = Cast <to = 9> (t) "
    body += "z = If (f) <then_branch = a () => (float[1, 2, 8] p) { p = Neg (g) }, "
    body += "else_branch = b () => (float[1, 2, 8] n) { n = Abs (g) }>"
    assert joined(model_of(body, "float[1, 2, 8] y, float[1, 2, 8] z", w=(K, 8), w2=(K, 8)))["Slice"] == 1


def test_an_output_that_is_left_out_is_no_input_that_is() -> None:
    """Both have the name "": the order of nodes would go round."""
    body = "c = Clip (x, , most) r = MatMul (c, wr) e, i = llmexport.MoeRoute (r) g = MatMul (c, w) u = MatMul (c, w2) "
    body += "y = llmexport.GatedAct (g, u)"
    model = model_of(body, "float[1, 2, 8] y, int32[1, 2, 4] i", wr=(K, 4), w=(K, 8), w2=(K, 8), most=())
    next(n for n in model.graph.node if n.op_type == "MoeRoute").output[0] = ""
    assert joined(model)["JoinedMoeRoute"] == 1


LEFT = {
    "halves of one product": ("g = MatMul (x, w) y = llmexport.GatedAct (g, g)", {"w": (K, 8)}, SERVED),
    "products of two tensors": (
        *("t = Neg (x) g = MatMul (x, w) u = MatMul (t, w2) y = llmexport.GatedAct (g, u)",),
        *({"w": (K, 8), "w2": (K, 8)}, SERVED),
    ),
    "what is not a product": ("g = MatMul (x, w) u = Neg (g) y = llmexport.GatedAct (g, u)", {"w": (K, 8)}, SERVED),
    "a weight that is computed": (
        *("w3 = Neg (w2) g = MatMul (x, w) u = MatMul (x, w3) y = llmexport.GatedAct (g, u)",),
        *({"w": (K, 8), "w2": (K, 8)}, SERVED),
    ),
    "heads behind another shape": (PLAIN.replace("to_2", "flat"), QKV_WEIGHTS, SERVED),
    "a library without the plugin": (MLP, {"w": (K, 8), "w2": (K, 8)}, frozenset(OPS)),
    "a bias of another shape": (
        *("g = MatMul (x, w) h = Add (g, c) u = MatMul (x, w2) y = llmexport.GatedAct (h, u)",),
        *({"w": (K, 8), "w2": (K, 8), "c": (1,)}, SERVED),
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_plugins_cannot_read_stays(name: str) -> None:
    body, weights, served = LEFT[name]
    model = model_of(body, "float[B, T, N] y", **weights)
    before = Counter(n.op_type for n in model.graph.node)
    if name == "heads behind another shape":
        # x is one row of two tokens, which that view takes for two rows.
        join_products(model, served, [], Path())
        assert Counter(n.op_type for n in model.graph.node) == before
    else:
        assert joined(model, served) == before
