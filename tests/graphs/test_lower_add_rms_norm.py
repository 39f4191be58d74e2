"""lower_add_rms_norm: what it rewrites, what it leaves, and that the numbers stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest
from slot_graphs import run

from llmexport.graphs.cut import cut
from llmexport.graphs.lower_add_rms_norm import lower_add_rms_norm
from llmexport.plugins.spec import DOMAIN
from llmexport.validate.compare import compare

C = 2880
SAID: dict[str, Any] = {"epsilon": 1e-5, "weight_offset": 0.0, "round_before_weight": 1}
NORM = "[norm] y, sum = {domain}.AddRmsNorm<epsilon = {epsilon}, weight_offset = {weight_offset}, "
NORM += "round_before_weight = {round_before_weight}>({inputs})"
BIASED = "[biased] x = Add(a, bias)"


def model(before: str = BIASED, inputs: str = "x, r, w", kind: str = "float", more: str = "", **said: Any) -> Any:
    norm = NORM.format(domain=DOMAIN, inputs=inputs, **SAID | said)
    shape = f"{kind}[B,T,{C}]"
    given = f"{shape} a, {shape} r, {kind}[{C}] w, {kind}[{C}] bias, {kind}[1] one, {kind}[{C}] i"
    ends = f"{shape} y, {shape} sum{more}"
    header = f'<ir_version: 10, opset_import: ["": 23, "{DOMAIN}": 1, "com.microsoft": 1]>'
    made = onnx.parser.parse_model(f"{header} g ({given}) => ({ends}) {{ {before} {norm} }}")
    dtype = onnx.TensorProto.FLOAT if kind == "float" else onnx.TensorProto.FLOAT16
    made.graph.value_info.append(onnx.helper.make_tensor_value_info("x", dtype, ["B", "T", C]))
    return made


def lowered(made: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    graph = gs.import_onnx(made)
    fused = lower_add_rms_norm(graph)
    assert fused.refused == []
    return onnx.ModelProto.FromString(gs.export_onnx(graph, ir_version=10).SerializeToString()), fused.count


def feed() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"a": (2, 3, C), "r": (2, 3, C), "w": (C,), "bias": (C,), "one": (1,), "i": (C,)}
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def expected(bias: bool = True) -> tuple[np.ndarray, np.ndarray]:
    given = {n: v.astype(np.float64) for n, v in feed().items()}
    total = given["a"] + given["r"] + (given["bias"] if bias else 0)
    return total / np.sqrt((total**2).mean(-1, keepdims=True) + 1e-5) * given["w"], total


@pytest.mark.parametrize("inputs", ["x, r, w", "r, x, w"])
def test_a_sum_with_a_bias_and_its_norm_are_one_operator(inputs: str) -> None:
    made, count = lowered(model(inputs=inputs))
    assert (count, [n.op_type for n in made.graph.node]) == (1, ["SkipSimplifiedLayerNormalization"])
    for ours, right in zip(run(made, feed()), expected(), strict=True):
        assert compare(right, ours).rms_ratio < 1e-6


def test_an_offset_is_added_to_the_weight() -> None:
    made, count = lowered(model(weight_offset=1.0))
    assert (count, [n.op_type for n in made.graph.node]) == (1, ["Add", "SkipSimplifiedLayerNormalization"])
    given = feed()
    right = run(made, given | {"w": given["w"] - 1})
    for ours, expect in zip(right, expected(), strict=True):
        assert compare(expect, ours).rms_ratio < 1e-6


@pytest.mark.parametrize("case", ["no bias", "read elsewhere", "one number", "an output"])
def test_what_is_no_bias_of_a_summand_alone_stays(case: str) -> None:
    given, bias = model(), True
    if case == "no bias":
        given, bias = model("", "a, r, w"), False
    if case == "one number":
        given = model(BIASED.replace("bias)", "one)"))
    if case == "read elsewhere":
        given = model(f"{BIASED} [else] z = Neg(x)", more=f", float[B,T,{C}] z")
    if case == "an output":
        given = model(more=f", float[B,T,{C}] x")
    found, count = lowered(given)
    assert (count, len([n for n in found.graph.node if n.op_type == "Add"])) == (1, int(bias))
    right, ours = run(given, feed()), run(found, feed())
    for one, other in zip(right, ours, strict=True):
        assert compare(one, other).rms_ratio < 1e-6


@pytest.mark.parametrize("changes", [{"inputs": "x, r, w, i"}, {"kind": "float16"}], ids=["inner", "fp16"])
def test_others_are_no_candidates(changes: dict[str, Any]) -> None:
    made, count = lowered(model(**changes))
    assert (count, [n.op_type for n in made.graph.node]) == (0, ["Add", "AddRmsNorm"])


def test_a_part_behind_the_sum_is_cut_with_its_norm() -> None:
    made, _ = lowered(model())
    inputs = [v for v in (*made.graph.output, *made.graph.input) if v.name in ("sum", "w")]
    right = expected()
    [ours] = run(cut(made, inputs, ["y"]), feed() | {"sum": right[1].astype(np.float32)})
    assert compare(right[0], ours).rms_ratio < 1e-6
