"""Torch ops that export as one standard operator: the operator must mean what the torch op computes."""

import numpy as np
import onnx.reference
import onnxruntime
import torch

from llmexport.export import trace
from llmexport.export.blocks.standard import attention, tensor_scatter
from llmexport.validate.compare import compare
from llmexport.validate.tolerance import TOLERANCE


def test_attention_carries_a_scale_that_is_not_the_operators_default() -> None:
    """Its default is 1 / sqrt(head size), which every block so far happens to use."""
    sizes = {"q": [2, 4, "t", 8], "k": [2, 2, "s", 8], "v": [2, 2, "s", 8], "mask": [2, 1, "t", "s"]}
    examples = [
        torch.empty([{"t": 5, "s": 7}.get(d, d) for d in shape], device="meta", dtype=torch.float32)
        for shape in sizes.values()
    ]
    examples[3] = examples[3].bool()
    model = trace._export(
        lambda q, k, v, mask: attention(q, k, v, mask, 0.9), examples, list(sizes), list(sizes.values()), ["y"]
    )
    assert [n.op_type for n in model.graph.node] == ["Attention"]
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal(s, np.float32) for s in ((2, 4, 3, 8), (2, 2, 9, 8), (2, 2, 9, 8)))
    mask = random.random((2, 1, 3, 9)) < 0.7
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    [found] = session.run(None, {"q": q, "k": k, "v": v, "mask": mask})
    wide = [np.repeat(x.astype(np.float64), 2, 1) for x in (k, v)]
    scores = np.where(mask, q.astype(np.float64) @ wide[0].swapaxes(-1, -2) * 0.9, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = weights / weights.sum(-1, keepdims=True) @ wide[1]
    assert compare(expected, found).excess(TOLERANCE["float32"]) <= 1


def test_tensor_scatter_is_the_operator_that_onnx_means() -> None:
    random = np.random.default_rng(0)
    past, update = (random.standard_normal((3, 2, n, 4), np.float32) for n in (9, 4))
    at = np.array([0, 5, 2])
    shapes = {"past": ["b", 2, 9, 4], "update": ["b", 2, "t", 4], "at": ["b"]}
    examples = [torch.empty(s, device="meta") for s in ((5, 2, 9, 4), (5, 2, 3, 4))]
    examples.append(torch.empty(5, dtype=torch.int64, device="meta"))
    model = trace._export(tensor_scatter, examples, list(shapes), list(shapes.values()), ["y"], 24)
    assert [n.op_type for n in model.graph.node] == ["TensorScatter"]
    [expected] = onnx.reference.ReferenceEvaluator(model).run(None, {"past": past, "update": update, "at": at})
    found = tensor_scatter(*map(torch.from_numpy, (past, update, at))).numpy()
    assert np.array_equal(found, expected)
    assert np.array_equal(found[1, :, 5:], update[1])
