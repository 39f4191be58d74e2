"""Torch ops that export as one standard operator: the operator must mean what the torch op computes."""

import numpy as np
import onnxruntime
import torch

from llmexport.export import trace
from llmexport.export.blocks.standard import attention
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
