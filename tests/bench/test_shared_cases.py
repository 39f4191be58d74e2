"""The benchmark's cases of a shared expert, without a GPU: as one of the experts, and as an MLP beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from native import emulated_library

from llmexport.plugins.host import Library, desc


@pytest.fixture
def each(bench: Any) -> list[Any]:
    import shared_cases

    return list({case.family: case for case in shared_cases.cases()}.values())


def test_plugins_take_every_case(each: list[Any]) -> None:
    library = Library(emulated_library())
    for case in each:
        meta = case.on("meta")
        descs = [desc(t.shape, t.dtype) for t in (*meta, *case.outputs(meta))]
        library.create(case.op, case.attributes).configure(descs)
        [weights, chosen] = meta[1:3]
        assert weights.shape == chosen.shape == (case.B, case.T, case.routed.layer.K + 1)


def test_bytes_are_those_of_an_expert_more(each: list[Any]) -> None:
    qwen = next(case for case in each if case.family.startswith("Qwen3.5"))
    assert qwen.bytes - qwen.routed.bytes == 3 * 2048 * 512 * 2


@pytest.mark.parametrize("which", range(4))
def test_an_mlp_beside_them_computes_the_same(
    bench: Any, compute: Callable[..., None], each: list[Any], which: int
) -> None:
    torch.manual_seed(which)
    layer = replace(each[which].routed.layer, C=64, I=32, E=8)
    case = replace(each[which], routed=replace(each[which].routed, layer=layer, B=1, T=3))
    inputs = case.on("cpu")
    together = case.outputs(inputs)
    compute(case, inputs, together)
    assert all(bench.agree(case, wanted, found) for wanted, found in case.checked(inputs, together))
    for step in case.apart(inputs):
        made = step() if callable(step) else compute(*step)
    assert bench.agree(case, together[0], made)
    assert not bench.agree(case, together[0], made * 1.05)
