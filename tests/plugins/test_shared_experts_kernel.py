"""The kernels that route to a shared expert and compute it as n of the routed ones, against the MLP that it is beside
them, in float64.

Imports neither torch nor onnx: test_sanitizers.py runs it under sanitizers.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from kernel_numbers import Values, near, random, rounded
from moe_nodes import Node, activated, exact, name, run
from pairwise import pairwise
from plugin_host import DTYPES, Machine, computed

from llmexport.plugins.shared_route import SLOTS

ROUTE = {"top_k": 2, "scoring": "sigmoid", "renormalise": True, "scale": 1.5, "groups": 1, "groups_kept": 1}
# Pairs that are found and such that are sorted, tiles of few and of many rows; no whole vectors.
SIZES = [
    Node(1, 2, 8, 64, 40),
    Node(7, 2, 8, 64, 40, B=2),
    Node(65, 2, 4, 72, 32),
    Node(150, 2, 16, 64, 40),
    Node(9, 2, 4, 37, 19),
]
FORMS = [{}, {"interleaved": True}, {"transposed": True}, {"transposed": True, "scale_input": True}]


def mlp(node: Node, x: Values, matrices: list[Values], first: int, dtype: str) -> Values:
    """What the experts from `first` on make of all rows as one MLP, whose inner values are rounded."""
    gates, ups, downs = [], [], []
    for e in range(first, node.E):
        both, down = (m[e].astype(np.float64) for m in matrices)
        both, down = (both, down) if node.transposed else (both.T, down.T)
        halves = (both[:, 0::2], both[:, 1::2]) if node.interleaved else np.split(both, 2, 1)
        for parts, part in zip((gates, ups, downs), (*halves, down), strict=True):
            parts.append(part)
    gate, up = (rounded(x.astype(np.float64) @ np.concatenate(parts, 1), dtype) for parts in (gates, ups))
    return rounded(activated(gate, up, node.attributes), dtype) @ np.concatenate(downs)


@pytest.mark.parametrize(
    ("routed", "dtype", "form", "count", "gated"), pairwise(SIZES, [*DTYPES], FORMS, (1, 2, 3), (False, True)), ids=str
)
def test_it_is_an_mlp_beside_the_others(
    machine: Machine, routed: Node, dtype: str, form: dict[str, bool], count: int, gated: bool
) -> None:
    gated = gated and "scale_input" not in form
    routed = replace(routed, **form)
    node = replace(routed, E=routed.E + count, K=routed.K + count)
    logits, gate = (random((routed.B, routed.T, n), dtype, n) for n in (routed.E, 1))
    route = machine.library.create(f"{'Gated' * gated}SharedMoeRoute", {**ROUTE, "group_best": 1, SLOTS: node.K})
    weights, experts = computed(route, machine.memory(), [logits, *([gate] if gated else [])])
    # Weights of the experts that nobody chose are NaN, and all may be chosen.
    x, *_ = node.inputs(dtype)
    inputs = replace(node, T=256, B=1, K=node.E).inputs(dtype)[3:]
    found = run(machine, node, [x, weights, experts, *inputs])
    own = [x, weights[..., : routed.K], experts[..., : routed.K], *(m[: routed.E] for m in inputs)]
    factor = 1 / (1 + np.exp(-gate.astype(np.float64))) if gated else 1.0
    want = exact(routed, own, dtype) + factor * mlp(node, x, inputs, routed.E, dtype)
    # Every slice of it is rounded, and its gate.
    assert near(found, want, dtype, 2 + count), name(node)
