"""Wkv7: RWKV-7's generalised delta rule, which removes by one key and writes by another."""

import torch
from torch import Tensor

from llmexport.plugins.spec import op
from llmexport.plugins.wkv7.body import RATE, body


def fake(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, kappa: Tensor, a: Tensor, present: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v), torch.empty_like(state)


@op(
    "Wkv7",
    version=1,
    dims={
        "r": "B T H D",
        "w": "B T H D",
        "k": "B T H D",
        "v": "B T H V",
        "kappa": "B T H D",
        "a": "B T H D",
        "present": "B T",
        "state": "B H V D",
    },
    outputs={"y": "B T H V", "next_state": "B H V D"},
    static=("H", "D", "V"),
    types={"state": "float32", "next_state": "float32"},
    body=body,
    fake=fake,
)
def wkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, kappa: Tensor, a: Tensor, present: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Token by token: S = S (diag(exp(-exp(-1/2) sigmoid(w))) - kappa^T (a kappa)) + v^T k; y = S r (arXiv 2503.14456,
    section 4).

    r, w, k, kappa (of length one in the model) and a [B, T, H, D]; v [B, T, H, V]; present [B, T] is 0 for padding,
    which leaves the state as it is and reads it for a y that means nothing; state and next_state [B, H, V, D] fp32. All
    is computed in fp32, y rounded once.
    """
    wide_r, wide_k, wide_v, wide_kappa = r.float(), k.float(), v.float(), kappa.float()
    decay, back = torch.exp(RATE * torch.sigmoid(w.float())), wide_kappa * a.float()
    y = torch.empty_like(wide_v)
    state = state.clone()
    for t in range(v.shape[1]):
        known = state @ wide_kappa[:, t].unsqueeze(-1)
        kept = state * decay[:, t].unsqueeze(-2) - known * back[:, t].unsqueeze(-2)
        after = kept + wide_v[:, t].unsqueeze(-1) * wide_k[:, t].unsqueeze(-2)
        state = torch.where(present[:, t, None, None, None] != 0, after, state)
        y[:, t] = (state @ wide_r[:, t].unsqueeze(-1)).squeeze(-1)
    return y.to(v.dtype), state
