"""The benchmark's peers and bounds, without a GPU: they are given what they document, and so compute the same.

What is not installed is stood in for by its documented meaning, in float64.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
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


def step(state: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: float, beta: float) -> Any:
    """One token of one head: state [D, V], q and k [D], v [V]; y and the state after it."""
    q, k = (x / (x.square().sum() + 1e-6).sqrt() for x in (q, k))
    state = decay * state
    state = state + torch.outer(k, beta * (v - k @ state))
    return q @ state, state


def gated_delta_rule(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of one row, [T, heads, ..], after a state [H, D, V]."""
    y, shared = torch.empty_like(v), v.shape[1] // q.shape[1]
    for h in range(v.shape[1]):
        for t in range(len(v)):
            y[t, h], state[h] = step(
                state[h], q[t, h // shared], k[t, h // shared], v[t, h], float(decay[t, h]), float(beta[t, h])
            )
    return y, state


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float,
    initial_state: torch.Tensor,
    output_final_state: bool,
    cu_seqlens: torch.Tensor,
    use_qk_l2norm_in_kernel: bool,
    output: torch.Tensor,
    output_state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    assert (g.dtype, beta.dtype, initial_state.dtype) == (torch.float32,) * 3
    assert output_final_state
    assert use_qk_l2norm_in_kernel
    for row, (first, end) in enumerate(itertools.pairwise(cu_seqlens)):
        q_, k_, v_, g_, beta_ = (x[first:end].double() for x in (q, k, v, g, beta))
        y, state = gated_delta_rule(q_, k_, v_, g_, beta_, initial_state[row].double().mT.clone())
        output[first:end], output_state[row] = scale * y, state.mT
    return output, output_state


def gated_delta_rule_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    A_log: torch.Tensor,
    a: torch.Tensor,
    dt_bias: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    use_qk_l2norm: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    assert (A_log.dtype, state.dtype, a.dtype, b.dtype) == (torch.float32, torch.float32, q.dtype, q.dtype)
    assert use_qk_l2norm
    decay = torch.exp(-A_log.double().exp() * torch.nn.functional.softplus(a.double() + dt_bias))
    y = torch.empty_like(v)
    for row in range(len(q)):
        tokens = (x[row].double() for x in (q, k, v, decay, b.double().sigmoid()))
        found, moved = gated_delta_rule(*tokens, state[row].double())
        y[row], state[row] = scale * found, moved
    return y, state


@pytest.mark.parametrize("tokens", [1, 9])
def test_flashinfer_is_given_the_delta_rule(
    bench: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    stand_in(monkeypatch, "flashinfer.gdn_prefill", chunk_gated_delta_rule=chunk_gated_delta_rule)
    stand_in(monkeypatch, "flashinfer.gdn_decode", gated_delta_rule_decode=gated_delta_rule_decode)
    cases = bench("delta_rule_cases")
    torch.manual_seed(2)
    case = cases.DeltaRuleCase(cases.Layer("small", 2, 4, 16, 16), 2, tokens)
    inputs = case.on("cpu")
    before = inputs[5].clone()
    wanted_y, wanted_state = case.reference(*inputs)
    y, state = (cases.flashinfer_chunks if tokens > 1 else cases.flashinfer_token)(case)(*inputs)
    assert near(wanted_y, y.view_as(wanted_y))
    assert near(wanted_state, state.mT if tokens > 1 else state)
    assert torch.equal(inputs[5], before)


class AttentionWithSinks:
    """Pages of a cache by flashinfer's rules: attends row by row, each query to its own and all earlier keys."""

    def __init__(self, workspace: torch.Tensor, kv_layout: str, window_left: int, **types: object) -> None:
        assert kv_layout == "HND"
        self.window_left = window_left

    def plan(
        self,
        qo_indptr: torch.Tensor,
        indptr: torch.Tensor,
        pages: torch.Tensor,
        last: torch.Tensor,
        heads: int,
        groups: int,
        size: int,
        page_size: int,
        causal: bool,
        window_left: int,
        **types: object,
    ) -> None:
        assert causal
        assert window_left == self.window_left
        self.rows = [qo_indptr, indptr, pages, last]
        self.shared, self.page_size = heads // groups, page_size

    def run(self, q: torch.Tensor, cache: tuple[torch.Tensor, ...], sinks: torch.Tensor, scale: float) -> torch.Tensor:
        assert sinks.dtype == torch.float32
        qo_indptr, indptr, pages, last = self.rows
        y = torch.empty_like(q)
        for row in range(len(last)):
            of_row = pages[indptr[row] : indptr[row + 1]]
            there = (len(of_row) - 1) * self.page_size + int(last[row])
            k, v = (x[of_row].transpose(0, 1).flatten(1, 2)[:, :there].double() for x in cache)
            first, end = int(qo_indptr[row]), int(qo_indptr[row + 1])
            for at in range(first, end):
                here = there - (end - at)
                low = max(0, here - self.window_left) if self.window_left >= 0 else 0
                for h in range(q.shape[1]):
                    keys, values = (x[h // self.shared, low : here + 1] for x in (k, v))
                    logits = torch.cat((scale * keys @ q[at, h].double(), sinks[h : h + 1].double()))
                    y[at, h] = logits.softmax(0)[:-1] @ values
        return y


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("tokens", [1, 7])
def test_flashinfer_is_given_the_sinks(
    bench: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tokens: int, window: int
) -> None:
    stand_in(monkeypatch, "flashinfer", BatchAttentionWithAttentionSinkWrapper=AttentionWithSinks)
    cases, peers = bench("attention_cases"), bench("attention_peers")
    torch.manual_seed(3)
    layer = cases.Layer("small", 4, 2, 16, window=window, sinks=True)
    case = cases.AttentionCase(layer, 2, tokens, 7)
    inputs = case.on("cpu")
    assert near(case.reference(*inputs), peers.flashinfer_sinks(case)(*inputs))


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


def test_mxfp4_steps_are_held_to_what_others_are(bench: Callable[[str], Any]) -> None:
    cases = bench("expert_cases")
    packed = [case for case in cases.cases() if case.layer.mxfp4 and case.T == 1]
    assert [case.target for case in packed] == [0.7, 0.85, 0.85]


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


def test_who_fails_says_why_and_no_one_else_does(bench: Callable[[str], Any]) -> None:
    def absent() -> list[Callable[[], object]]:
        raise ModuleNotFoundError("no such peer\nand more")

    assert bench("bench_ops").attempt(absent) == "ModuleNotFoundError: no such peer"


def test_results_say_which_versions_they_are_of(bench: Callable[[str], Any]) -> None:
    report = bench("report")
    found = report.versions()
    assert set(found) <= set(report.PEERS)
    assert {name: importlib.metadata.version(name) for name in ("torch", "transformers")}.items() <= found.items()
    assert ("flashinfer-python" in found) == (importlib.util.find_spec("flashinfer") is not None)
