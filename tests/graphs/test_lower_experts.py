"""lower_experts: what it rewrites, what it leaves, and that QMoE gives what the weights mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info

from llmexport.export.graph_file import load_body
from llmexport.graphs.bodies import attach_bodies
from llmexport.graphs.lower_experts import HELD, lower_experts
from llmexport.plugins.spec import DOMAIN
from llmexport.validate.compare import compare
from llmexport.validate.tolerance import TOLERANCE

E, K, C, I = 5, 2, 64, 96  # noqa: E741
ROUTE = {"top_k": K, "scoring": "softmax", "renormalise": 0, "scale": 2.5, "groups": 1, "groups_kept": 1}
ROUTE |= {"group_best": 1}
SAID: dict[str, Any] = {"activation": "silu", "alpha": 0.0, "limit": 0.0, "transposed": 0, "interleaved": 1}
SAID |= {"scale_input": 0, "format": "uint4", "group": 32}


def weights(
    group: int = 32, *, zeros: bool = False, bias: bool = False, factors: float = 0, bits: int = 4
) -> dict[str, np.ndarray]:
    """The inputs of a node but x and its routing."""
    rng = np.random.default_rng(0)
    held: dict[str, dict[str, np.ndarray]] = {n: {} for n in ("", "_bias", "_scales", "_factors", "_zeros")}
    for name, rows, columns, parts in (("gate_up", 2 * I, C, 2), ("down", C, I, 1)):
        groups = -(-columns // group)
        held[""][name] = rng.integers(0, 256, (E, rows, columns * bits // 8)).astype(np.uint8)
        held["_bias"][name] = rng.standard_normal((E, rows)).astype(np.float32) * bias
        held["_scales"][name] = rng.uniform(0.02, 0.04, (E, rows, groups)).astype(np.float32)
        if zeros or factors:
            held["_factors"][name] = np.full((E, parts), factors or 1, np.float32)
        if zeros:
            held["_zeros"][name] = rng.integers(0, 16, (E, rows, groups)).astype(np.uint8)
    return {name + end: array for end, arrays in held.items() for name, array in arrays.items()}


def model(held: dict[str, np.ndarray], route: str = "MoeRoute", dtype: int = 1, **said: Any) -> onnx.ModelProto:
    """x [B, T, C] and logits [B, T, E] through a router and the experts, whose weights are initialisers."""
    inputs = [make_tensor_value_info(n, dtype, ["B", "T", s]) for n, s in (("x", C), ("logits", E))]
    float_inputs = [*inputs, make_tensor_value_info("given", dtype, ["B", "T", K])]
    chosen = make_node("MoeRoute", ["logits"], ["w", "e"], "route", domain=DOMAIN, **ROUTE)
    nodes = [chosen]
    weights_from = "w"
    if route == "an input":
        weights_from = "given"
    elif route != "MoeRoute":
        nodes.append(make_node(route, ["w"], ["other"], "other"))
        weights_from = "other"
    names = ["x", weights_from, "e", *(n for n in HELD if n in held)]
    nodes.append(make_node("MoeExperts", names, ["y"], "experts", domain=DOMAIN, **SAID | said))
    kinds = {"w": dtype, "other": dtype, "e": TensorProto.INT32}
    graph = make_graph(
        nodes,
        "g",
        float_inputs if route == "an input" else inputs,
        [make_tensor_value_info("y", dtype, ["B", "T", C])],
        [numpy_helper.from_array(a, n) for n, a in held.items()],
        value_info=[make_tensor_value_info(n, kind, ["B", "T", K]) for n, kind in kinds.items()],
    )
    return make_model(graph, opset_imports=[make_opsetid("", 23), make_opsetid(DOMAIN, 1)], ir_version=10)


def lowered(made: onnx.ModelProto) -> tuple[onnx.ModelProto, list[tuple[str, str]]]:
    graph = gs.import_onnx(made)
    fused = lower_experts(graph)
    assert fused.count + len(fused.refused) == 1
    return gs.export_onnx(graph, ir_version=10), fused.refused


def ran(made: onnx.ModelProto, feed: dict[str, np.ndarray]) -> np.ndarray:
    attach_bodies(made, load_body)
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["y"], feed)[0])


def feed(batch: int, tokens: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(tokens)
    return {n: rng.standard_normal((batch, tokens, s)).astype(np.float32) for n, s in (("x", C), ("logits", E))}


def meant(held: dict[str, np.ndarray], name: str, columns: int, group: int) -> np.ndarray:
    """The weights of all experts in float64."""
    codes = held[name]
    numbers = np.stack((codes & 15, codes >> 4), -1).reshape(*codes.shape[:2], columns).astype(np.float64)

    def spread(said: np.ndarray) -> np.ndarray:
        return np.repeat(said.astype(np.float64), min(group, columns), -1)

    zero = spread(held[f"{name}_zeros"]) if f"{name}_zeros" in held else 8
    return (numbers - zero) * spread(held[f"{name}_scales"])


def expected(held: dict[str, np.ndarray], group: int, given: dict[str, np.ndarray], clamp: float | None) -> np.ndarray:
    """y in float64."""
    x, logits = (a.astype(np.float64).reshape(-1, a.shape[-1]) for a in given.values())
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares *= 2.5 / shares.sum(-1, keepdims=True)
    first, second = meant(held, "gate_up", C, group), meant(held, "down", I, group)
    y = np.zeros_like(x)
    for row, chosen in enumerate(np.argsort(-logits, -1, kind="stable")[:, :K]):
        for e in chosen:
            both = first[e] @ x[row] + held["gate_up_bias"][e]
            gate, up = both[::2], both[1::2]
            if clamp is None:
                gated = gate / (1 + np.exp(-gate)) * up
            else:
                gate, up = np.minimum(gate, clamp), np.clip(up, -clamp, clamp)
                gated = gate / (1 + np.exp(-1.7 * gate)) * (up + 1)
            y[row] += shares[row, e] * (second[e] @ gated + held["down_bias"][e])
    return y.reshape(given["x"].shape)


FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "zero points": {"zeros": True},
    "an odd number of zero points": {"zeros": True, "group": 16},
    "one scale a row": {"group": 96},
    "one zero point a row": {"group": 96, "zeros": True},
    "biases": {"bias": True},
}


@pytest.mark.parametrize("tokens", [0, 1, 63, 130])
@pytest.mark.parametrize("form", FORMS)
def test_qmoe_gives_what_the_weights_mean(form, tokens):
    held, group = weights(**FORMS[form]), FORMS[form].get("group", 32)
    found, refused = lowered(model(held, group=group))
    assert refused == []
    [node] = [n for n in found.graph.node if n.op_type == "QMoE"]
    assert node.output == ["y"]
    given = feed(2, tokens)
    wanted = expected(held, group, given, None)
    made = ran(found, given)
    assert made.shape == wanted.shape
    if tokens:
        assert compare(wanted.astype(np.float32), made).excess(TOLERANCE["float32"]) <= 1


def test_a_clamped_activation_is_clamped():
    held, given = weights(bias=True), feed(1, 63)
    found, refused = lowered(model(held, activation="swiglu_clamped", alpha=1.7, limit=0.7))
    assert refused == []
    wanted = expected(held, 32, given, 0.7)
    assert compare(wanted.astype(np.float32), ran(found, given)).excess(TOLERANCE["float32"]) <= 1
    assert (
        compare(expected(held, 32, given, 7.0).astype(np.float32), wanted.astype(np.float32)).excess(
            TOLERANCE["float32"]
        )
        > 1
    )


def test_an_expert_that_a_token_chose_twice_counts_twice():
    held, given = weights(), feed(1, 3)
    made = model(held)
    for node in made.graph.node:
        if node.op_type == "MoeExperts":
            node.input[2] = "twice"
    made.graph.input.append(make_tensor_value_info("twice", TensorProto.INT32, ["B", "T", K]))
    given["twice"] = np.full((1, 3, K), 4, np.int32)
    found, refused = lowered(made)
    assert refused == []
    assert compare(ran(made, given), ran(found, given)).excess(TOLERANCE["float32"]) <= 1


# What is another in a node, or of its weights, or in what its routing weights go through.
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "its weights are uint8: QMoE rounds what it multiplies with those to 8 bits": ({"bits": 8}, {"format": "uint8"}),
    "it computes in float16, not in float32": ({}, {"dtype": TensorProto.FLOAT16}),
    "its activation is gelu_tanh, not silu or swiglu_clamped": ({}, {"activation": "gelu_tanh"}),
    "its rows of gate and up do not alternate": ({}, {"interleaved": 0}),
    "the routing weight multiplies what goes in": ({}, {"scale_input": 1}),
    "its weights have factors": ({"factors": 0.5}, {}),
    "no blocks of 16 to 128 columns divide groups of 8 in rows of [64, 96]": ({"group": 8}, {"group": 8}),
    "its routing weights may be less than 0": ({}, {"route": "Neg"}),
}


@pytest.mark.parametrize("why", REFUSED)
def test_another_form_is_left_as_it_is(why):
    kind, said = REFUSED[why]
    found, refused = lowered(model(weights(**kind), **said))
    assert refused == [("experts", why)]
    assert [n.op_type for n in found.graph.node if n.op_type != "Neg"] == ["MoeRoute", "MoeExperts"]


def test_routing_weights_that_are_an_input_are_not_taken_for_positive():
    assert lowered(model(weights(), route="an input"))[1] == [("experts", "its routing weights may be less than 0")]


def test_routing_weights_of_a_negative_scale_are_not_taken_for_positive():
    made = model(weights())
    next(a for a in made.graph.node[0].attribute if a.name == "scale").f = -1.0
    assert lowered(made)[1] == [("experts", "its routing weights may be less than 0")]


def test_plain_weights_and_floats_are_none_of_its_business():
    graph = gs.import_onnx(model(weights(), format="fp8"))
    fused = lower_experts(graph)
    assert (fused.count, fused.refused) == (0, [])
