"""The benchmark's cases of MoeExperts, without a GPU: the plugin takes them, and the peers compute the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from native import emulated_library

from llmexport.plugins.host import Library, desc
from llmexport.validate.compare import compare
from llmexport.validate.tolerance import TOLERANCE

HERE = Path(__file__).parent


@pytest.fixture
def expert_cases(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(HERE))
    import expert_cases

    return expert_cases


def test_the_plugin_takes_every_case(expert_cases: Any) -> None:
    library = Library(emulated_library())
    for case in expert_cases.cases():
        plugin = library.create(case.op, case.attributes)
        inputs = [desc(t.shape, t.dtype) for t in case.on("meta")]
        assert plugin.output_shapes(inputs, known=True) == [(case.B, case.T, case.layer.C)]
        plugin.configure([*inputs, inputs[0]])


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_bytes_of_a_step_are_nearly_those_of_the_experts_it_has(expert_cases: Any, batch: int) -> None:
    """The mean over many random choices is what is expected of one."""
    layer = expert_cases.LAYERS[0]
    case = expert_cases.ExpertCase(layer, batch, 1)
    torch.manual_seed(0)
    ranked = torch.rand(400, batch, layer.E).topk(layer.K).indices
    chosen = sum(len(some.unique()) for some in ranked) / len(ranked)
    weights = chosen * 3 * layer.C * layer.I * 2
    assert abs(case.bytes - weights) < 0.02 * weights


@pytest.mark.parametrize("name", ["transformers grouped_mm", "transformers batched_mm"])
@pytest.mark.parametrize("layer", range(9))
def test_peers_compute_the_same(expert_cases: Any, layer: int, name: str) -> None:
    torch.manual_seed(1)
    small = replace(expert_cases.LAYERS[layer], C=64, I=32, E=8)
    case = expert_cases.ExpertCase(small, 2, 9)
    inputs = case.on("cpu")
    found, wanted = case.peers()[name](*inputs), case.reference(*inputs)
    assert compare(wanted.double().numpy(), found.double().numpy()).excess(TOLERANCE["bfloat16"]) <= 1
