"""Wkv: RWKV-4's mean of all values so far, whose weights decay with their age and grow with their keys."""

import torch
from torch import Tensor

from llmexport.plugins.spec import op
from llmexport.plugins.wkv.body import NOTHING, body


def fake(
    key: Tensor,
    value: Tensor,
    present: Tensor,
    time_decay: Tensor,
    time_first: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    maximum: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(key), torch.empty_like(numerator), torch.empty_like(numerator), torch.empty_like(numerator)


@op(
    "Wkv",
    version=1,
    dims={
        "key": "B T C",
        "value": "B T C",
        "present": "B T",
        "time_decay": "C",
        "time_first": "C",
        "numerator": "B C",
        "denominator": "B C",
        "maximum": "B C",
    },
    outputs={"y": "B T C", "next_numerator": "B C", "next_denominator": "B C", "next_maximum": "B C"},
    static=("C",),
    types=dict.fromkeys(
        (
            "time_decay",
            "time_first",
            *("numerator", "denominator", "maximum"),
            *("next_numerator", "next_denominator", "next_maximum"),
        ),
        "float32",
    ),
    body=body,
    fake=fake,
)
def wkv(
    key: Tensor,
    value: Tensor,
    present: Tensor,
    time_decay: Tensor,
    time_first: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    maximum: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token by token and channel by channel, with N and D sums over the tokens before and w = -exp(time_decay):

        y = (N + exp(time_first + k) v) / (D + exp(time_first + k)); N = exp(w) N + exp(k) v; D = exp(w) D + exp(k)

    (arXiv 2305.13048, section 3.1.2). key k and value v [B, T, C]; present [B, T] is 0 for padding, which leaves the
    states as they are and reads them for a y that means nothing; time_decay, time_first [C] fp32. The states [B, C]
    fp32 are N and D divided by exp(maximum), the largest exponent among their terms, as in modeling_rwkv.py: no
    exponent overflows. A denominator of 0 says that no token was seen, whatever the other two are, so that zeros begin
    a sequence; behind a token it is at least 1. All is computed in fp32, y rounded once.
    """
    decay, y = -time_decay.exp(), torch.empty_like(key)
    n, d = torch.where(denominator == 0, 0, numerator), denominator.clone()
    m = torch.where(denominator == 0, NOTHING, maximum)
    for t in range(key.shape[1]):
        k, v = key[:, t].float(), value[:, t].float()
        read, weight, _ = _added(n, d, m, k + time_first, v)
        y[:, t] = (read / weight).to(y.dtype)
        after = _added(n, d, m + decay, k, v)
        seen = present[:, t : t + 1] != 0
        n, d, m = (torch.where(seen, new, old) for new, old in zip(after, (n, d, m), strict=True))
    return y, n, d, m


def _added(n: Tensor, d: Tensor, m: Tensor, exponent: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The states with a term of this exponent."""
    largest = torch.maximum(m, exponent)
    old, new = (m - largest).exp(), (exponent - largest).exp()
    return old * n + new * v, old * d + new, largest
