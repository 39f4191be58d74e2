"""GatedDeltaRule: linear attention whose state decays and is corrected by the error of its own prediction."""

import torch
from torch import Tensor

from llmexport.plugins.spec import op

L2_EPSILON = 1e-6  # of the L2 norm of q and k, added to the sum of squares


def fake(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float, l2_norm: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v), torch.empty_like(state)


@op(
    "GatedDeltaRule",
    version=1,
    dims={
        "q": "B T G D",
        "k": "B T G D",
        "v": "B T H V",
        "g": "B T H",
        "beta": "B T H",
        "state": "B H D V",
    },
    outputs=("y", "next_state"),
    static=("G", "H", "D", "V"),
    types={"g": "float32", "state": "float32", "next_state": "float32"},
    fake=fake,
)
def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float, l2_norm: bool
) -> tuple[Tensor, Tensor]:
    """Token by token: S = exp(g) S; S = S + k (beta (v - k^T S)); y = scale q^T S (arXiv 2412.06464).

    q, k [B, T, G, D]; v [B, T, H, V], H a multiple of G, consecutive heads of v sharing one of q and k; g, the log
    of the decay, [B, T, H] fp32; beta [B, T, H]; state and next_state [B, H, D, V] fp32. l2_norm divides q and k
    by sqrt(sum of squares + 1e-6) first. All in fp32, y rounded once. The operator of ai.onnx 27 LinearAttention,
    update rule gated_delta; modeling_qwen3_5_moe.py computes the same in chunks.
    """
    shared = v.shape[2] // q.shape[2]
    wide_q, wide_k = (x.float() for x in (q, k))
    if l2_norm:
        wide_q, wide_k = (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + L2_EPSILON) for x in (wide_q, wide_k))
    wide_q, wide_k = ((x.repeat_interleave(shared, 2)).transpose(1, 2) for x in (wide_q * scale, wide_k))
    wide_v, wide_beta = v.float().transpose(1, 2), beta.float().transpose(1, 2)
    decay = g.float().exp().transpose(1, 2)
    y = torch.empty_like(wide_v)
    for t in range(v.shape[1]):
        state = state * decay[:, :, t, None, None]
        key = wide_k[:, :, t].unsqueeze(-1)
        error = (wide_v[:, :, t] - (key * state).sum(-2)) * wide_beta[:, :, t, None]
        state = state + key * error.unsqueeze(-2)
        y[:, :, t] = (wide_q[:, :, t].unsqueeze(-1) * state).sum(-2)
    return y.transpose(1, 2).to(v.dtype).contiguous(), state.clone()
