"""The pipeline: every pass, in order, on the graph of one small decoder layer."""

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import onnxruntime
import pytest

from llmexport.export.graph_file import load_body
from llmexport.graphs import pipeline
from llmexport.graphs.bodies import attach_bodies
from llmexport.graphs.fusion import Fused
from llmexport.validate.compare import compare
from llmexport.validate.tolerance import Tolerance

EPS = float(np.finfo(np.float32).eps)
HIDDEN = "float[batch, tokens, 7]"
# The MLP half of a decoder layer and the norm behind it, one norm without a sum before it.
LAYER = f"""({HIDDEN} x, float[7] w, float[7, 5] up_w, float[7, 5] gate_w, float[5, 7] down_w) => ({HIDDEN} y) {{
    [first] normed = RMSNormalization(x, w)
    [gate_proj] gate = MatMul(normed, gate_w)
    [up_proj] up = MatMul(normed, up_w)
    [sigmoid] s = Sigmoid(gate)
    [silu] a = Mul(gate, s)
    [gated] mixed = Mul(a, up)
    [down_proj] down = MatMul(mixed, down_w)
    [add] sum = Add(x, down)
    [last] y = RMSNormalization(sum, w)
}}"""


def model(text: str) -> onnx.ModelProto:
    header = '<ir_version: 10, opset_import: ["": 23, "llmexport": 1], producer_name: "llmexport">'
    made = onnx.parser.parse_model(f"{header} g {text}")
    return onnx.shape_inference.infer_shapes(made, strict_mode=True)


@pytest.fixture(scope="module")
def before() -> onnx.ModelProto:
    return model(LAYER)


@pytest.fixture(scope="module")
def results(before: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, Fused]]:
    return pipeline.run(before)


def test_reports_each_pass_by_its_name(results):
    assert list(results[1]) == ["fuse_add_rms_norm", "fuse_gated_act"]


def test_reports_what_each_pass_fused_and_refused(results):
    assert results[1]["fuse_add_rms_norm"] == Fused(1, [("first", "its input is not a sum")])
    assert results[1]["fuse_gated_act"] == Fused(1, [])


def test_every_pass_has_run_on_the_result(results):
    ops = [n.op_type for n in results[0].graph.node]
    assert ops == ["RMSNormalization", "MatMul", "MatMul", "GatedAct", "MatMul", "AddRmsNorm"]


def test_a_second_run_finds_nothing_more(results):
    assert {n: f.count for n, f in pipeline.run(results[0])[1].items()} == {
        "fuse_add_rms_norm": 0,
        "fuse_gated_act": 0,
    }


def test_the_model_that_came_in_stays_as_it_was(before, results):
    assert before == model(LAYER)


def test_the_interface_of_the_model_stays(before, results):
    assert list(results[0].graph.input) == list(before.graph.input)
    assert list(results[0].graph.output) == list(before.graph.output)


def test_versions_and_producer_stay(before, results):
    after = results[0]
    assert (after.ir_version, after.producer_name) == (before.ir_version, before.producer_name)
    assert {(o.domain, o.version) for o in after.opset_import} == {("", 23), ("llmexport", 1)}


def test_numbers_stay(before, results):
    after = onnx.ModelProto()
    after.CopyFrom(results[0])
    assert attach_bodies(after, load_body) == {"GatedAct": 1, "AddRmsNorm": 1}
    onnx.checker.check_model(after, full_check=True)
    seed = np.random.default_rng(0)
    shapes = {"x": (2, 63, 7), "w": (7,), "up_w": (7, 5), "gate_w": (7, 5), "down_w": (5, 7)}
    feeds = {n: seed.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    expected, found = (
        onnxruntime.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)[0]
        for m in (before, after)
    )
    # An activation and two norms, each some roundings of fp32, pass through a product of seven terms.
    assert compare(expected, found).excess(Tolerance(16 * EPS, 4 * EPS, scaled=True)) <= 1


def test_a_model_in_which_nothing_fuses_goes_through_unchanged():
    plain = model(f"({HIDDEN} x, {HIDDEN} residual) => ({HIDDEN} y) {{ [add] y = Add(x, residual) }}")
    after, results = pipeline.run(plain)
    assert all(r == Fused() for r in results.values())
    through = gs.export_onnx(gs.import_onnx(plain), ir_version=10, producer_name="llmexport")
    assert after.SerializeToString(deterministic=True) == through.SerializeToString(deterministic=True)
    assert list(after.graph.node) == list(plain.graph.node)
