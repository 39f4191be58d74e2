"""The benchmark's peers and bounds, without a GPU: they are given what they document, and so compute the same.

What is not installed is stood in for by flashinfer_rules.py.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from llmexport.validate.compare import compare
from llmexport.validate.tolerance import TOLERANCE

HERE = Path(__file__).parent


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    monkeypatch.syspath_prepend(str(HERE))
    return importlib.import_module


def near(wanted: torch.Tensor, found: torch.Tensor) -> bool:
    return compare(wanted.double().numpy(), found.double().numpy()).excess(TOLERANCE["bfloat16"]) <= 1


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **contents: object) -> None:
    module = ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, "flashinfer", sys.modules.get("flashinfer", ModuleType("flashinfer")))
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("tokens", [1, 9])
def test_flashinfer_is_given_the_delta_rule(
    bench: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    cases, rules = bench("delta_rule_cases"), bench("flashinfer_rules")
    stand_in(monkeypatch, "flashinfer.gdn_prefill", chunk_gated_delta_rule=rules.chunk_gated_delta_rule)
    stand_in(monkeypatch, "flashinfer.gdn_decode", gated_delta_rule_decode=rules.gated_delta_rule_decode)
    torch.manual_seed(2)
    case = cases.DeltaRuleCase(cases.Layer("small", 2, 4, 16, 16), 2, tokens)
    inputs = case.on("cpu")
    before = inputs[5].clone()
    wanted_y, wanted_state = case.reference(*inputs)
    y, state = (cases.flashinfer_chunks if tokens > 1 else cases.flashinfer_token)(case)(*inputs)
    assert near(wanted_y, y.view_as(wanted_y))
    assert near(wanted_state, state.mT if tokens > 1 else state)
    assert torch.equal(inputs[5], before)


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("tokens", [1, 7])
def test_flashinfer_is_given_the_sinks(
    bench: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tokens: int, window: int
) -> None:
    cases, peers = bench("attention_cases"), bench("attention_peers")
    wrapper = bench("flashinfer_rules").AttentionWithSinks
    stand_in(monkeypatch, "flashinfer", BatchAttentionWithAttentionSinkWrapper=wrapper)
    torch.manual_seed(3)
    layer = cases.Layer("small", 4, 2, 16, window=window, sinks=True)
    case = cases.AttentionCase(layer, 2, tokens, 7)
    inputs = case.on("cpu")
    assert near(case.reference(*inputs), peers.flashinfer_sinks(case)(*inputs))


@pytest.mark.parametrize("tokens", [1, 5])
def test_torch_writes_a_cache_in_place_where_ours_does(
    bench: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    cases = bench("op_cases")
    family = cases.Family("small", 64, 4, 2, 16, 4, 32)
    [case] = [c for c in cases.of_family(family, 3, tokens) if c.op == "QkNormRopeWrite"]
    inputs = case.on("cpu")
    wanted = case.reference(*inputs)
    assert not torch.equal(wanted[1], inputs[5])
    found = cases.eager(case)(*inputs)
    assert all(map(torch.equal, found, wanted))
    assert [found[1].data_ptr(), found[2].data_ptr()] == [inputs[5].data_ptr(), inputs[6].data_ptr()]
    monkeypatch.setattr(cases.Case, "outputs", lambda case, inputs: case.results())
    query, *caches = case.timed_outputs(inputs)
    assert query.is_meta
    assert [id(c) for c in caches] == [id(p) for p in inputs[5:7]]


@pytest.mark.skipif(importlib.util.find_spec("cudnn") is None, reason="pip install nvidia-cudnn-frontend")
def test_cudnn_accepts_the_graphs(bench: Callable[[str], Any]) -> None:
    """It checks shapes and options without a GPU."""
    cases, peers = bench("attention_cases"), bench("attention_peers")
    checked = [case for case in cases.cases() if case.layer.sinks and case.T > 1]
    for case in checked:
        _, (*_, sinks, y) = peers.cudnn_graph(case)
        assert list(sinks.get_dim()) == [1, case.layer.H, 1, 1]
        assert list(y.get_dim()) == [case.B, case.layer.H, case.T, case.layer.D]
    assert checked


@pytest.mark.parametrize("layer", range(4))
def test_grouped_products_are_those_of_each_pair(bench: Callable[[str], Any], layer: int) -> None:
    cases = bench("expert_cases")
    case = cases.ExpertCase(replace(cases.LAYERS[layer], C=64, I=32, E=8), 2, 9)
    inputs = case.on("cpu")
    torch.manual_seed(4)
    up, down = cases.grouped_products(case, *inputs)()
    torch.manual_seed(4)
    rows, gated, first, second, ends = cases.sorted_rows(case, *inputs)
    assert int(ends[-1]) == len(rows) == 18 * case.layer.K
    begin = 0
    for e, end in enumerate(ends.tolist()):
        assert end - begin == int((inputs[2] == e).sum())
        if end > begin:
            part = slice(begin, end)
            assert near(rows[part].float() @ first[e].float(), up[part])
            assert near(gated[part].float() @ second[e].float(), down[part])
        begin = end
    dense = cases.dense_products(case, *inputs)()
    assert [x.shape for x in dense] == [up.shape, down.shape]


def test_a_copy_touches_the_bytes_of_the_chosen_experts(
    bench: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cases, clock = bench("expert_cases"), bench("gpu_clock")
    case = cases.ExpertCase(replace(cases.LAYERS[0], C=64, I=32, E=8, K=2), 3, 1)
    inputs = case.on("meta")
    inputs[2] = torch.tensor([[[0, 1]], [[1, 0]], [[0, 5]]], dtype=torch.int32)
    asked: list[int] = []
    monkeypatch.setattr(cases, "copy_of", asked.append)
    cases.copy_of_touched(case, *inputs)
    assert asked == [3 * 3 * 64 * 32 * 2 + 2 * 3 * 64 * 2]
    copied = clock.copy_of(1000, "cpu")
    assert copied().nbytes == 500
    assert torch.equal(copied(), copied.args[0])


def test_packed_steps_are_held_to_what_others_are(bench: Callable[[str], Any]) -> None:
    cases = bench("expert_cases")
    packed = [case for case in cases.cases() if case.layer.format != "plain" and case.T == 1]
    assert [case.target for case in packed] == [0.7, 0.85, 0.85] * 4


@pytest.mark.parametrize("tokens", [1, 70])
def test_a_state_half_a_percent_off_is_wrong(bench: Callable[[str], Any], tokens: int) -> None:
    cases, ops = bench("delta_rule_cases"), bench("bench_ops")
    torch.manual_seed(5)
    case = cases.DeltaRuleCase(cases.Layer("small", 1, 2, 16, 16), 1, tokens)
    inputs = case.on("cpu")
    y, state = case.reference(*inputs)

    def right(*outputs: torch.Tensor) -> list[bool]:
        return [ops.agree(case, *pair) for pair in case.checked(inputs, list(outputs))]

    assert right(y, state * (1 + 2.0**-22)) == [True, True]
    assert right(y, state * 1.005) == [True, False]
    assert right(y * 1.05, state) == [False, True]


@pytest.mark.parametrize("tokens", [1, 70])
def test_transformers_computes_the_rule_of_kimi(bench: Callable[[str], Any], tokens: int) -> None:
    cases, ops = bench("kimi_delta_cases"), bench("bench_ops")
    torch.manual_seed(6)
    case = cases.KimiDeltaCase(cases.Layer("small", 2, 2, 16, 16), 2, tokens)
    inputs = case.on("cpu")
    theirs = cases.torch_rule(case)(*inputs)
    assert [ops.agree(case, *pair) for pair in case.checked(inputs, list(theirs))] == [True, True]


def test_bounds_are_timed_but_no_peers(bench: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls take as many seconds as they add to a clock."""
    ops, clock, now = bench("bench_ops"), bench("gpu_clock"), [0.0]

    def takes(seconds: float) -> Callable[..., object]:
        return lambda *inputs: now.append(now.pop() + seconds)

    def measured(calls: list[Callable[[], object]]) -> float:
        before = now[0]
        for call in calls:
            call()
        return (now[0] - before) / len(calls)

    def absent(*inputs: object) -> object:
        raise ModuleNotFoundError("no such peer")

    class Case:
        bytes, target = 1, 0.4
        inputs = staticmethod(lambda: [1])
        outputs = staticmethod(lambda inputs: inputs)
        peers = staticmethod(lambda: {"slow": takes(3.0), "absent": absent})
        bounds = staticmethod(lambda: {"copy": lambda *inputs: takes(0.5)})
        floor = staticmethod(lambda ceilings: 1.0)

    monkeypatch.setattr(clock, "seconds_each", measured)
    monkeypatch.setattr(clock, "sets_for", lambda size: 2)
    monkeypatch.setattr(ops, "ours", lambda *arguments: takes(2.0))
    times = ops.timed(Case, None, with_peers=True)
    assert times["seconds"] == {"llmexport": 2.0, "slow": 3.0, "absent": "ModuleNotFoundError: no such peer"}
    assert times["bounds"] == {"copy": 0.5}
    judged = ops.judged(Case, times["seconds"], clock.Ceilings(1, 1, 1, 1))
    assert judged == {"of_floor": 0.5, "of_launch": 2.0, "best_peer_ratio": 1.5, "met": True}
    assert ops.timed(Case, None, with_peers=False) == {"seconds": {"llmexport": 2.0}, "bounds": {}}


def test_results_say_which_versions_they_are_of(bench: Callable[[str], Any]) -> None:
    report = bench("report")
    found = report.versions()
    assert set(found) <= set(report.PEERS)
    assert {name: importlib.metadata.version(name) for name in ("torch", "transformers")}.items() <= found.items()
    assert ("flashinfer-python" in found) == (importlib.util.find_spec("flashinfer") is not None)
