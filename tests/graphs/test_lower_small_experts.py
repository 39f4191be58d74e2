"""lower_small_experts: what it rewrites, what it leaves, and that MoE gives what MoeRoute and MoeExperts mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info

from llmexport.graphs import lower_small_experts
from llmexport.plugins.spec import DOMAIN
from llmexport.validate.compare import compare
from llmexport.validate.tolerance import TOLERANCE

E, K, C, I = 5, 2, 48, 40  # noqa: E741
ROUTE: dict[str, Any] = {"top_k": K, "scoring": "softmax_top_k", "renormalise": 0, "scale": 1.0, "groups": 1}
ROUTE |= {"groups_kept": 1, "group_best": 1}
SAID: dict[str, Any] = {"activation": "swiglu_clamped", "alpha": 1.7, "limit": 0.7, "transposed": 0, "interleaved": 1}
SAID |= {"scale_input": 0, "format": "plain", "group": 0}
STACKS = {"gate_up": (E, 2 * I, C), "down": (E, C, I), "gate_up_bias": (E, 2 * I), "down_bias": (E, C)}


def model(
    inputs: tuple[str, ...] = tuple(STACKS),
    route: dict[str, Any] | None = None,
    stored: int = TensorProto.FLOAT,
    dtype: int = TensorProto.FLOAT,
    **said: Any,
) -> onnx.ModelProto:
    """x [B, T, C] and logits [B, T, E] through a router and the experts, whose weights are inputs, as in a trace."""
    own = {n: make_tensor_value_info(n, stored, STACKS[n]) for n in inputs}
    given = [make_tensor_value_info(n, dtype, ["B", "T", s]) for n, s in (("x", C), ("logits", E))]
    nodes = [
        make_node("Mul", ["x", "two"], ["twice"], "twice"),
        make_node("MoeRoute", ["logits"], ["w", "e"], "route", domain=DOMAIN, **ROUTE | (route or {})),
        make_node("MoeExperts", ["twice", "w", "e", *own], ["mixed"], "experts", domain=DOMAIN, **SAID | said),
        make_node("Mul", ["mixed", "two"], ["y"], "last"),
    ]
    shapes = {"twice": (dtype, C), "mixed": (dtype, C), "w": (dtype, K), "e": (TensorProto.INT32, K)}
    graph = make_graph(
        nodes,
        "g",
        [*given, *own.values()],
        [make_tensor_value_info("y", dtype, ["B", "T", C])],
        [numpy_helper.from_array(np.array(2, "float32"), "two")],
        value_info=[make_tensor_value_info(n, kind, ["B", "T", s]) for n, (kind, s) in shapes.items()],
    )
    opsets = [make_opsetid("", 23), make_opsetid(DOMAIN, 1), make_opsetid("com.microsoft", 1)]
    return make_model(graph, opset_imports=opsets, ir_version=10)


def lowered(made: onnx.ModelProto) -> tuple[onnx.ModelProto, int, list[tuple[str, str]]]:
    graph = gs.import_onnx(made)
    fused = lower_small_experts.lower_small_experts(graph)
    return gs.export_onnx(graph, ir_version=10), fused.count, fused.refused


def feed(tokens: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(tokens)
    drawn = {"x": (2, tokens, C), "logits": (2, tokens, E)} | STACKS
    given = {n: rng.standard_normal(shape).astype(np.float32) for n, shape in drawn.items()}
    given |= {n: given[n] / 8 for n in ("gate_up", "down")}
    return given | {"logits": 3 * given["logits"]}


def expected(given: dict[str, np.ndarray], activation: str, scale: float, *, over_all: bool) -> np.ndarray:
    """y in float64; the sum of a token's weights is 1, whether the softmax is over_all or over those that are chosen,
    and then `scale` times that."""
    wide = {n: a.astype(np.float64) for n, a in given.items()}
    rows, logits = (wide[n].reshape(-1, wide[n].shape[-1]) for n in ("x", "logits"))
    y = np.zeros_like(rows)
    for row, chosen in enumerate(np.argsort(-logits, -1, kind="stable")[:, :K]):
        of = logits[row] if over_all else logits[row, chosen]
        shares = np.exp(logits[row, chosen] - of.max())
        for e, share in zip(chosen, scale * shares / shares.sum(), strict=True):
            both = wide["gate_up"][e] @ (2 * rows[row])
            both += wide["gate_up_bias"][e] if "gate_up_bias" in wide else 0
            gate, up = both[::2], both[1::2]
            if activation == "silu":
                gated = gate / (1 + np.exp(-gate)) * up
            else:
                gate, up = np.minimum(gate, 0.7), np.clip(up, -0.7, 0.7)
                gated = gate / (1 + np.exp(-1.7 * gate)) * (up + 1)
            y[row] += 2 * share * (wide["down"][e] @ gated + (wide["down_bias"][e] if "down_bias" in wide else 0))
    return y.reshape(given["x"].shape)


@pytest.mark.parametrize("tokens", [0, 1, 3, 65])
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize(
    ("activation", "scoring"), [("swiglu_clamped", "softmax_top_k"), ("silu", "softmax")], ids=["clamped", "plain"]
)
def test_moe_gives_what_router_and_experts_mean(activation, scoring, scale, biases, tokens):
    inputs = tuple(STACKS)[: 4 if biases else 2]
    route = {"scoring": scoring, "renormalise": int(scoring == "softmax"), "scale": scale}
    found, count, refused = lowered(model(inputs, route, activation=activation))
    assert (count, refused) == (1, [])
    assert {n.op_type for n in found.graph.node} == {"Mul", "Reshape", "MoE"}
    given = {n: a for n, a in feed(tokens).items() if n in ("x", "logits", *inputs)}
    # x is read by nobody else, so that the operator may write over it.
    session = onnxruntime.InferenceSession(found.SerializeToString(), providers=["CPUExecutionProvider"])
    [made] = session.run(["y"], given)
    wanted = expected(given, activation, scale, over_all=scoring == "softmax")
    assert made.shape == wanted.shape
    if tokens:
        assert compare(wanted.astype(np.float32), made).excess(TOLERANCE["float32"]) <= 1


# What is another in the experts, in their router, or in the types.
REFUSED: dict[str, dict[str, Any]] = {
    "it or its weights are not in float32": {"stored": TensorProto.BFLOAT16},
    "its activation is gelu_tanh, not silu or swiglu_clamped": {"activation": "gelu_tanh"},
    "the routing weight multiplies what goes in": {"scale_input": 1},
    "its routing weights are not divided by their sum": {"route": {"scoring": "softmax"}},
    "its experts are not chosen by a softmax alone": {"route": {"scoring": "sigmoid", "renormalise": 1}},
}


@pytest.mark.parametrize("why", REFUSED)
def test_another_form_is_left_as_it_is(why):
    found, count, refused = lowered(model(**REFUSED[why]))
    assert (count, refused) == (0, [("experts", why)])
    assert [n.op_type for n in found.graph.node] == ["Mul", "MoeRoute", "MoeExperts", "Mul"]


def test_float16_is_left_as_it_is():
    why = "it or its weights are not in float32"
    assert lowered(model(stored=TensorProto.FLOAT16, dtype=TensorProto.FLOAT16))[1:] == (0, [("experts", why)])


def test_groups_of_experts_are_left_as_they_are():
    made = model(route={"groups": 5, "groups_kept": 2, "renormalise": 1, "scoring": "softmax"})
    assert lowered(made)[1:] == (0, [("experts", "its experts are not chosen by a softmax alone")])


def test_a_correction_is_left_as_it_is():
    made = model(route={"renormalise": 1, "scoring": "softmax"})
    made.graph.node[1].input.append("correction")
    made.graph.input.append(make_tensor_value_info("correction", TensorProto.FLOAT, [E]))
    assert lowered(made)[1:] == (0, [("experts", "its experts are not chosen by a softmax alone")])


@pytest.mark.parametrize("value", ["w", "e"])
def test_a_choice_that_others_read_is_left_as_it_is(value):
    made = model()
    made.graph.output.append(made.graph.value_info[2 if value == "w" else 3])
    made.graph.node.append(make_node("Identity", [value], ["seen"], "seen"))
    made.graph.output[-1].name = "seen"
    assert lowered(made)[1:] == (0, [("experts", "its routing weights or its choice have other readers")])


def test_a_choice_that_is_an_output_is_left_as_it_is():
    made = model()
    made.graph.output.append(made.graph.value_info[2])
    assert lowered(made)[1:] == (0, [("experts", "its routing weights or its choice have other readers")])


def test_weights_of_another_maker_are_left_as_they_are():
    made = model()
    made.graph.node[2].input[1] = "given"
    made.graph.input.append(make_tensor_value_info("given", TensorProto.FLOAT, ["B", "T", K]))
    why = "no MoeRoute makes its routing weights and its choice"
    assert lowered(made)[1:] == (0, [("experts", why)])


def test_large_experts_are_left_as_they_are(monkeypatch):
    monkeypatch.setattr(lower_small_experts, "SMALL", 3 * C * I - 1)
    why = f"an expert has {3 * C * I} numbers, of which MoE is faster up to {3 * C * I - 1}"
    assert lowered(model())[1:] == (0, [("experts", why)])
    monkeypatch.setattr(lower_small_experts, "SMALL", 3 * C * I)
    assert lowered(model())[1:] == (1, [])


@pytest.mark.parametrize("said", [{"interleaved": 0}, {"transposed": 1}, {"format": "uint4", "group": 32}])
def test_experts_that_lie_otherwise_are_none_of_its_business(said):
    assert lowered(model(**said))[1:] == (0, [])
