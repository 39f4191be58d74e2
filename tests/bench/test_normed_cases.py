"""The benchmark's cases of joined plugins, without a GPU: the plugins compute them, and so do their ops in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from native import emulated_library

from llmexport.plugins.host import Library, desc
from llmexport.plugins.normed import ADDENDS


@pytest.fixture
def normed_cases(bench: Any) -> Any:
    import normed_cases

    return normed_cases


def small(case: Any) -> Any:
    """The case with few numbers and two tokens."""
    if hasattr(case, "experts"):
        layer = replace(case.experts.layer, C=64, I=32, E=8, K=min(case.experts.layer.K, 3))
        return replace(case, experts=replace(case.experts, layer=layer, B=1, T=2))
    return replace(case, B=2, T=1, H=4, kv=2)


def each_plugin(normed_cases: Any) -> list[Any]:
    return list({case.op: case for case in normed_cases.cases()}.values())


def test_plugins_take_every_case(normed_cases: Any) -> None:
    library, seen = Library(emulated_library()), set()
    for case in normed_cases.cases():
        plugin = library.create(case.op, case.attributes)
        meta = case.on("meta")
        descs = [desc(t.shape, t.dtype) for t in (*meta, *case.outputs(meta))]
        assert plugin.output_shapes(descs[: len(meta)], known=True) == [t.shape for t in case.outputs(meta)]
        plugin.configure(descs)
        seen.add(case.op)
    assert seen == {*ADDENDS, "BiasedJoinedQkNormRopeWrite"}


@pytest.mark.parametrize("which", range(4))
def test_numbers_are_the_references_as_the_benchmark_asks(
    bench: Any, compute: Callable[..., None], normed_cases: Any, which: int
) -> None:
    torch.manual_seed(which)
    case = small(each_plugin(normed_cases)[which])
    inputs = case.on("cpu")
    outputs = case.outputs(inputs)
    compute(case, inputs, outputs)
    assert all(bench.agree(case, wanted, found) for wanted, found in case.checked(inputs, outputs))
    outputs[0].mul_(1.05)
    assert not all(bench.agree(case, wanted, found) for wanted, found in case.checked(inputs, outputs))


@pytest.mark.parametrize("which", range(4))
def test_one_after_another_computes_the_same(
    bench: Any, compute: Callable[..., None], normed_cases: Any, which: int
) -> None:
    torch.manual_seed(which)
    case = small(each_plugin(normed_cases)[which])
    inputs = case.on("cpu")
    together = case.outputs(inputs)
    compute(case, inputs, together)
    steps = case.apart(inputs)
    for step in steps:
        step() if callable(step) else compute(*step)
    found = steps[-1][2]
    # torch rounds a sigmoid and a product of it, where the plugin rounds as TensorRT does.
    same = bench.agree if len(ADDENDS.get(case.op, ())) > 1 else lambda _case, a, b: torch.equal(a, b)
    assert same(case, together[0], found[0])
