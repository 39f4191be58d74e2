"""The benchmark's cases of joined plugins, without a GPU: the plugins compute them, and so do their ops in turn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from native import emulated_library
from plugin_cases import array_of
from plugin_host import computed
from plugin_memory import CpuMemory

from llmexport.plugins.host import Library, desc
from llmexport.plugins.normed import ADDENDS

HERE = Path(__file__).parent


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(HERE))
    import bench_ops

    return bench_ops


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


def given(library: Library, case: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
    plugin = library.create(case.op, case.attributes).attach()
    for output, found in zip(outputs, computed(plugin, CpuMemory(), [array_of(x) for x in inputs]), strict=True):
        array_of(output)[...] = found


def each_plugin(normed_cases: Any) -> list[Any]:
    return list({case.op: case for case in normed_cases.cases()}.values())


def test_plugins_take_every_case(normed_cases: Any) -> None:
    library, seen = Library(emulated_library()), set()
    for case in normed_cases.cases():
        plugin = library.create(case.op, case.attributes)
        meta = case.on("meta")
        descs = [desc(t.shape, array_of(t.new_empty(0, device="cpu")).dtype) for t in (*meta, *case.outputs(meta))]
        assert plugin.output_shapes(descs[: len(meta)], known=True) == [t.shape for t in case.outputs(meta)]
        plugin.configure(descs)
        seen.add(case.op)
    assert seen == {*ADDENDS, "BiasedJoinedQkNormRopeWrite"}


@pytest.mark.parametrize("which", range(4))
def test_numbers_are_the_references_as_the_benchmark_asks(bench: Any, normed_cases: Any, which: int) -> None:
    torch.manual_seed(which)
    case = small(each_plugin(normed_cases)[which])
    inputs = case.on("cpu")
    outputs = case.outputs(inputs)
    given(Library(emulated_library()), case, inputs, outputs)
    assert all(bench.agree(case, wanted, found) for wanted, found in case.checked(inputs, outputs))
    outputs[0].mul_(1.05)
    assert not all(bench.agree(case, wanted, found) for wanted, found in case.checked(inputs, outputs))


@pytest.mark.parametrize("which", range(4))
def test_one_after_another_computes_the_same(bench: Any, normed_cases: Any, which: int) -> None:
    torch.manual_seed(which)
    library, case = Library(emulated_library()), small(each_plugin(normed_cases)[which])
    inputs = case.on("cpu")
    together = case.outputs(inputs)
    given(library, case, inputs, together)
    steps = case.apart(inputs)
    for step in steps:
        step() if callable(step) else given(library, *step)
    found = steps[-1][2]
    # torch rounds a sigmoid and a product of it, where the plugin rounds as TensorRT does.
    same = bench.agree if len(ADDENDS.get(case.op, ())) > 1 else lambda _case, a, b: torch.equal(a, b)
    assert same(case, together[0], found[0])
