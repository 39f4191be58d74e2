"""KimiDeltaRule: the gated delta rule whose state decays channel by channel."""

import torch
from torch import Tensor

from llmexport.plugins.gated_delta_rule.body import L2_EPSILON
from llmexport.plugins.kimi_delta_rule.body import body
from llmexport.plugins.linear_attention import linear_attention
from llmexport.plugins.spec import Attribute, op


def fake(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float, l2_norm: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v), torch.empty_like(state)


def by_operator(attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int]) -> str:
    """The body for ONNX Runtime alone, whose LinearAttention computes in float32 what is float32."""
    if types["v"] != "float32":
        return body(attributes, types, sizes)
    flat = """decay_flat = Constant <value_ints = [0, 0, -1]> ()
    decay = Reshape (g, decay_flat)
    """
    return flat + linear_attention(attributes, sizes, decay="decay", key_heads=sizes["H"])


@op(
    "KimiDeltaRule",
    version=1,
    dims={
        "q": "B T H D",
        "k": "B T H D",
        "v": "B T H V",
        "g": "B T H D",
        "beta": "B T H",
        "state": "B H D V",
    },
    outputs={"y": "B T H V", "next_state": "B H D V"},
    static=("H", "D", "V"),
    types={"g": "float32", "state": "float32", "next_state": "float32"},
    body=body,
    bodies={"onnxruntime": by_operator},
    fake=fake,
)
def kimi_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float, l2_norm: bool
) -> tuple[Tensor, Tensor]:
    """Token by token: S = diag(exp(g)) S; S = S + k (beta (v - k^T S)); y = scale q^T S (arXiv 2510.26692).

    q, k [B, T, H, D]; v [B, T, H, V]; g, the log of the decay of each channel of k, [B, T, H, D] fp32; beta [B, T, H];
    state and next_state [B, H, D, V] fp32. l2_norm divides q and k by sqrt(sum of squares + 1e-6) first. All is
    computed in fp32 and y is rounded once (modeling_kimi_linear.py, recurrent_kimi_delta_attention). Kernels compute
    long prompts in chunks, in which a NaN of a token may spread to the 15 before it.
    """
    wide_q, wide_k, wide_v = q.float(), k.float(), v.float()
    if l2_norm:
        wide_q, wide_k = (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + L2_EPSILON) for x in (wide_q, wide_k))
    wide_q, decay, wide_beta = wide_q * scale, g.exp(), beta.float()
    y = torch.empty_like(wide_v)
    state = state.clone()
    for t in range(v.shape[1]):
        state = state * decay[:, t].unsqueeze(-1)
        known = (wide_k[:, t].unsqueeze(-2) @ state).squeeze(-2)
        error = wide_beta[:, t].unsqueeze(-1) * (wide_v[:, t] - known)
        state = state + wide_k[:, t].unsqueeze(-1) * error.unsqueeze(-2)
        y[:, t] = (wide_q[:, t].unsqueeze(-2) @ state).squeeze(-2)
    return y.to(v.dtype), state
