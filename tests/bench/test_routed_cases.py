"""The benchmark's cases of what norms and routes, without a GPU: the plugins compute them, and so do their ops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from native import emulated_library

from llmexport.plugins.host import Library, desc
from llmexport.plugins.normed_route import NORMED_ROUTES


@pytest.fixture
def routed_cases(bench: Any) -> Any:
    import routed_cases

    return routed_cases


def small(routed_cases: Any, which: int) -> Any:
    model = routed_cases.MODELS[which]
    fewer = replace(model, C=64, E=16, K=min(model.K, 3), groups=min(model.groups, 2), kept=1)
    return routed_cases.RoutedCase(fewer, 2, 3)


def test_plugins_take_every_case(routed_cases: Any) -> None:
    library, seen = Library(emulated_library()), set()
    for case in routed_cases.cases():
        plugin = library.create(case.op, case.attributes)
        meta = case.on("meta")
        descs = [desc(t.shape, t.dtype) for t in (*meta, *case.outputs(meta))]
        assert plugin.output_shapes(descs[: len(meta)], known=True) == [t.shape for t in case.outputs(meta)]
        plugin.configure(descs)
        seen.add(case.op)
    assert seen == {*NORMED_ROUTES}


@pytest.mark.parametrize("which", range(5))
def test_numbers_are_the_references_as_the_benchmark_asks(
    bench: Any, compute: Callable[..., None], routed_cases: Any, which: int
) -> None:
    torch.manual_seed(which)
    case = small(routed_cases, which)
    inputs = case.on("cpu")
    outputs = case.outputs(inputs)
    compute(case, inputs, outputs)
    assert all(bench.agree(case, *pair) for pair in case.checked(inputs, outputs))
    for place, wrong in ((0, outputs[0] * 1.05), (2, outputs[2] * 1.1), (3, (outputs[3] + 1) % 16)):
        spoilt = [*outputs[:place], wrong, *outputs[place + 1 :]]
        assert not all(bench.agree(case, *pair) for pair in case.checked(inputs, spoilt))


@pytest.mark.parametrize("which", range(5))
def test_one_after_another_computes_the_same(
    bench: Any, compute: Callable[..., None], routed_cases: Any, which: int
) -> None:
    torch.manual_seed(which)
    case = small(routed_cases, which)
    inputs = case.on("cpu")
    together = case.outputs(inputs)
    compute(case, inputs, together)
    norm, multiply, route = case.apart(inputs)
    compute(*norm)
    multiply()
    compute(*route)
    assert torch.equal(together[1], norm[2][1])
    assert bench.agree(case, norm[2][0], together[0])
    assert bench.agree(case, route[2][0].bfloat16(), together[2])
    assert (route[2][1] == together[3]).float().mean() > 0.8
