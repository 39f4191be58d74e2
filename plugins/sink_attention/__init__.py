"""SinkAttention: attention with learned sinks, a sliding window and a soft cap, over a grown or preallocated cache."""

import torch
from torch import Tensor

from llmexport.plugins.spec import op


@op(
    "SinkAttention",
    version=2,
    dims={"q": "B H T D", "k": "B G S D", "v": "B G S D", "start": "B", "length": "B", "sinks": "H"},
    outputs={"y": "B T H D"},
    static=("H", "G", "D"),
    types={"start": "int32", "length": "int32"},
)
def sink_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    length: Tensor,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    window: int,
) -> Tensor:
    """softmax(scale * q k^T, sink) v over the visible keys (modeling_gpt_oss.py, which rounds every step to q's type).

    All is computed in fp32 and rounded once; the kernels for 16 bits round the weights, too, before they meet v.
    q [B, H, T, D]; k, v [B, G, S, D], H a multiple of G; y [B, T, H, D], as what reads it wants the heads of a token
    side by side. start, length [B] int32: of its S keys, row b has those with start[b] <= j < length[b]. Query i stands
    at p = length[b] - T + i and sees key j if start[b] <= j <= p and, with a window > 0, j > p - window. sinks [H] are
    logits of one more key per head whose value is zero: they only take weight away, and a sink of -inf takes none.
    softcap > 0 turns a logit s into softcap * tanh(s / softcap) before the mask (modeling_gemma2.py). A query that sees
    no key gives zeros.
    """
    batch, heads, tokens, size = q.shape
    groups, keys = k.shape[1], k.shape[2]
    grouped = q.reshape(batch, groups, heads // groups * tokens, size).float()
    logits = (grouped @ k.float().transpose(-1, -2) * scale).reshape(batch, heads, tokens, keys)
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    last = (length - tokens).reshape(-1, 1, 1) + torch.arange(tokens, dtype=torch.int32, device=q.device).reshape(-1, 1)
    key = torch.arange(keys, dtype=torch.int32, device=q.device)
    visible = torch.logical_and(key >= start.reshape(-1, 1, 1), key <= last)
    if window > 0:
        visible = torch.logical_and(visible, key > last - window)
    visible = visible.unsqueeze(1)
    logits = torch.where(visible, logits, torch.finfo(torch.float32).min)
    most = logits.amax(-1, keepdim=True)
    if sinks is not None:
        sink = sinks.float().reshape(1, -1, 1, 1)
        most = torch.maximum(most, sink)
    # A row without keys has no largest logit: its weights are all zero through the mask.
    weights = torch.exp(logits - most) * visible
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sink - most)
    # The total is 0 for a row without keys whose sink is missing or -inf; else it is at least 1.
    weights = (weights / total.clamp(min=1e-30)).reshape(batch, groups, heads // groups * tokens, keys)
    return (weights @ v.float()).reshape(batch, heads, tokens, size).to(q.dtype).transpose(1, 2)
