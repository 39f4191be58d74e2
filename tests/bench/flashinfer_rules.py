"""What flashinfer 0.7.2 documents of the calls that the benchmark makes, in float64: it stands in for them in tests."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F


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
    decay = torch.exp(-A_log.double().exp() * F.softplus(a.double() + dt_bias))
    y = torch.empty_like(v)
    for row in range(len(q)):
        tokens = (x[row].double() for x in (q, k, v, decay, b.double().sigmoid()))
        found, moved = gated_delta_rule(*tokens, state[row].double())
        y[row], state[row] = scale * found, moved
    return y, state


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
