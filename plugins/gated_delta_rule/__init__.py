"""GatedDeltaRule: linear attention whose state decays and is corrected by the error of its own prediction."""

import torch
from torch import Tensor

from llmexport.plugins.gated_delta_rule.body import L2_EPSILON, body
from llmexport.plugins.linear_attention import linear_attention
from llmexport.plugins.spec import Attribute, op

CHUNK = 64  # tokens that are computed at once


def fake(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float, l2_norm: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v), torch.empty_like(state)


def by_operator(attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int]) -> str:
    """The body for ONNX Runtime alone, whose LinearAttention computes in float32 what is float32."""
    if types["v"] != "float32":
        return body(attributes, types, sizes)
    return linear_attention(attributes, sizes, decay="g", key_heads=sizes["G"])


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
    outputs={"y": "B T H V", "next_state": "B H D V"},
    static=("G", "H", "D", "V"),
    types={"g": "float32", "state": "float32", "next_state": "float32"},
    body=body,
    bodies={"onnxruntime": by_operator},
    fake=fake,
)
def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float, l2_norm: bool
) -> tuple[Tensor, Tensor]:
    """Token by token: S = exp(g) S; S = S + k (beta (v - k^T S)); y = scale q^T S (arXiv 2412.06464).

    q, k [B, T, G, D]; v [B, T, H, V], H a multiple of G, consecutive heads of v sharing one of q and k; g, the log of
    the decay, [B, T, H] fp32; beta [B, T, H]; state and next_state [B, H, D, V] fp32. l2_norm divides q and k by
    sqrt(sum of squares + 1e-6) first. All is computed in fp32 and y is rounded once: y is no mean of values, and beyond
    65504 is infinite in fp16, where bf16 holds it. The op is LinearAttention of ai.onnx 27 with update rule
    gated_delta, and that of modeling_qwen3_5_moe.py, which rounds alike. Tokens are computed in chunks, so that a NaN
    of a token may spread to the others of its chunk.
    """
    shared = v.shape[2] // q.shape[2]
    wide_q, wide_k, wide_v = q.float(), k.float(), v.float()
    if l2_norm:
        wide_q, wide_k = (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + L2_EPSILON) for x in (wide_q, wide_k))
    wide_q, wide_k = (x.repeat_interleave(shared, 2) for x in (wide_q * scale, wide_k))
    sequences = [x.transpose(1, 2) for x in (wide_q, wide_k, wide_v, g.unsqueeze(-1), beta.float().unsqueeze(-1))]
    y = torch.empty_like(sequences[2])
    for start in range(0, v.shape[1], CHUNK):
        part = slice(start, start + CHUNK)
        q_c, k_c, v_c, g_c, beta_c = (x[:, :, part] for x in sequences)
        y[:, :, part], state = _chunk(q_c, k_c, v_c, g_c, beta_c, state)
    return y.transpose(1, 2).to(v.dtype).contiguous(), state.clone()


def _chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """y and the next state of a chunk, whose corrections of the state, v_new, solve one triangular system.

    q, k, v [B, H, C, features]; g, beta [B, H, C, 1]. This is as exact as token by token, whatever the keys, and 4 to
    40 times faster: substitution solves the system, and every decay between two tokens has a sum of g of its own, as
    differences of running sums would lose small steps after large ones.
    """
    decay = g.expand(*g.shape[:-1], g.shape[-2]).tril(-1).cumsum(-2).exp().tril()
    decay_in = g.cumsum(-2).exp()
    system = beta * (k @ k.mT) * decay
    v_new = torch.linalg.solve_triangular(system, beta * (v - decay_in * (k @ state)), upper=False, unitriangular=True)
    y = decay_in * (q @ state) + (q @ k.mT * decay) @ v_new
    return y, decay_in[..., -1:, :] * state + k.mT @ (decay[..., -1:, :].mT * v_new)
