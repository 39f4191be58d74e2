"""MoeExperts: the gated MLPs of the experts that were chosen, weighted and summed."""

import torch
from torch import Tensor

from llmexport.plugins.gated_act import ACTIVATIONS, gated_act
from llmexport.plugins.moe_experts.body import body
from llmexport.plugins.moe_experts.mxfp4 import dequantise
from llmexport.plugins.spec import op


def fake(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate_up_scales: Tensor | None,
    down_scales: Tensor | None,
    activation: str,
    alpha: float,
    limit: float,
    transposed: bool,
    interleaved: bool,
    scale_input: bool,
) -> Tensor:
    return x.new_empty(x.shape)


@op(
    "MoeExperts",
    version=1,
    dims={
        "x": "B T C",
        "weights": "B T K",
        "experts": "B T K",
        "gate_up": "E P Q",
        "down": "E R S",
        "gate_up_bias": "E J",
        "down_bias": "E C",
        "gate_up_scales": "E P M",
        "down_scales": "E R N",
    },
    outputs={"y": "B T C"},
    static=("C", "K", "E", "P", "Q", "R", "S"),
    types={
        "experts": "int32",
        "gate_up": "W",
        "down": "W",
        "gate_up_scales": "uint8",
        "down_scales": "uint8",
    },
    choices={"activation": ACTIVATIONS},
    body=body,
    fake=fake,
)
def moe_experts(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate_up_scales: Tensor | None,
    down_scales: Tensor | None,
    activation: str,
    alpha: float,
    limit: float,
    transposed: bool,
    interleaved: bool,
    scale_input: bool,
) -> Tensor:
    """sum over k of weights[k] * down_e(act(gate_e(x)) * up_e(x)) with e = experts[k]; no other expert is computed.

    x, y [B, T, C]; weights [B, T, K]; experts [B, T, K] int32. gate_up [E, 2I, C] and down [E, C, I] as nn.Linear
    keeps them, or [E, C, 2I] and [E, I, C] if transposed; their float type may be another than x's and is cast to
    it. gate and up are the halves of 2I, or its even and odd rows if interleaved. Biases [E, 2I] and [E, C].
    activation, alpha and limit are GatedAct's. Projections give x's dtype, and their sum with the bias is rounded to
    it again; the weighted outputs are summed in fp32 and rounded once, where GptOssExperts and Qwen3_5MoeExperts of
    transformers round each of them and their sum. scale_input multiplies x by the weight, rounded, and leaves the
    output as it is (modeling_llama4.py).

    With scales, which need biases, the weights are MXFP4 (OCP Microscaling 1.0, transformers integrations/mxfp4.py):
    gate_up [E, 2I, C / 2] uint8 of two 4-bit values each, low nibble first, gate_up_scales [E, 2I, C / 32] uint8
    powers of two with bias 127; down and down_scales alike; never transposed.
    """
    batch, tokens, hidden = x.shape
    rows, picked = x.reshape(-1, hidden), experts.reshape(batch * tokens, -1)
    total = torch.zeros(rows.shape, dtype=torch.float32, device=x.device)
    scales = weights.reshape(batch * tokens, -1, 1)
    for e in picked.unique().tolist():
        token, slot = torch.where(picked == e)
        inputs, scale = rows[token], scales[token, slot]
        first, second = gate_up[e], down[e]
        if gate_up_scales is not None and down_scales is not None:
            first, second = dequantise(first, gate_up_scales[e]), dequantise(second, down_scales[e])
        if not transposed:
            first, second = first.mT, second.mT
        both = (inputs * scale if scale_input else inputs) @ first.to(x.dtype)
        if gate_up_bias is not None:
            both = both + gate_up_bias[e]
        gate, up = (both[:, 0::2], both[:, 1::2]) if interleaved else both.chunk(2, -1)
        out = gated_act(gate.unsqueeze(0), up.unsqueeze(0), activation, alpha, limit)[0] @ second.to(x.dtype)
        if down_bias is not None:
            out = out + down_bias[e]
        total.index_add_(0, token, out.float() if scale_input else out.float() * scale.float())
    return total.to(x.dtype).reshape(x.shape)
