"""MoeExperts: the gated MLPs of the experts that were chosen, weighted and summed."""

from typing import Any

import torch
from torch import Tensor

from llmexport.plugins.gated_act import ACTIVATIONS, gated_act
from llmexport.plugins.moe_experts.body import body
from llmexport.plugins.moe_experts.by_expert import by_expert
from llmexport.plugins.moe_experts.formats import check, check_shapes, dequantise
from llmexport.plugins.packed_formats import FORMATS, PLAIN
from llmexport.plugins.spec import op


def _check(given: dict[str, Any]) -> None:
    format, group, tensors = given["format"], given["group"], {n: t for n, t in given.items() if isinstance(t, Tensor)}
    check(format, group, given["transposed"], {n: str(t.dtype).removeprefix("torch.") for n, t in tensors.items()})
    if format != PLAIN:
        check_shapes(format, group, {n: tuple(t.shape) for n, t in tensors.items()})


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
    gate_up_factors: Tensor | None,
    down_factors: Tensor | None,
    gate_up_zeros: Tensor | None,
    down_zeros: Tensor | None,
    activation: str,
    alpha: float,
    limit: float,
    transposed: bool,
    interleaved: bool,
    scale_input: bool,
    format: str,
    group: int,
) -> Tensor:
    _check(locals())
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
        "gate_up_factors": "E F",
        "down_factors": "E G",
        "gate_up_zeros": "E P M",
        "down_zeros": "E R N",
    },
    outputs={"y": "B T C"},
    static=("C", "K", "E", "P", "Q", "R", "S"),
    types={
        "experts": "int32",
        "gate_up": "W",
        "down": "W",
        "gate_up_scales": "S",
        "down_scales": "S",
        "gate_up_factors": "float32",
        "down_factors": "float32",
        "gate_up_zeros": "uint8",
        "down_zeros": "uint8",
    },
    choices={"activation": ACTIVATIONS, "format": FORMATS},
    body=body,
    bodies={"onnxruntime": by_expert},
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
    gate_up_factors: Tensor | None,
    down_factors: Tensor | None,
    gate_up_zeros: Tensor | None,
    down_zeros: Tensor | None,
    activation: str,
    alpha: float,
    limit: float,
    transposed: bool,
    interleaved: bool,
    scale_input: bool,
    format: str,
    group: int,
) -> Tensor:
    """sum over k of weights[k] * down_e(act(gate_e(x)) * up_e(x)) with e = experts[k]; no other expert is computed.

    x, y [B, T, C]; weights [B, T, K]; experts [B, T, K] int32. gate_up [E, 2I, C] and down [E, C, I] as nn.Linear
    keeps them, or [E, C, 2I] and [E, I, C] if transposed; their float type may be another than x's and is cast to
    it. gate and up are the halves of 2I, or its even and odd rows if interleaved. Biases [E, 2I] and [E, C].
    activation, alpha and limit are GatedAct's. Projections give x's dtype, and their sum with the bias is rounded to
    it again; the weighted outputs are summed in fp32 and rounded once, where GptOssExperts and Qwen3_5MoeExperts of
    transformers round each of them and their sum. scale_input multiplies x by the weight, rounded, and leaves the
    output as it is (modeling_llama4.py).

    Weights of another `format` than plain are uint8 codes as nn.Linear keeps rows, [E, 2I, C] and [E, C, I], 4-bit ones
    two a byte along columns, the low nibble first. A weight is (code - zero) * scale * factor in fp32, rounded to x's
    type. `group` columns of a row share a scale and a zero point, the last of them maybe fewer: scales and zeros are
    [E, 2I, ceil(C / group)] and [E, C, ceil(I / group)].

    mxfp4, mxfp8 (OCP Microscaling 1.0): E2M1 and E4M3 in groups of 32, scales uint8 powers of two with bias 127.
    nvfp4: E2M1 in groups of 16, scales uint8 codes of E4M3.
    fp8, int8: E4M3, and two's complement; fp32 scales.
    uint4, uint8: less zeros, uint8; less 8 and 128 where there are none; fp32 scales.

    gate_up_factors [E, 2], of gate and of up, and down_factors [E, 1], fp32, are 1 where there are none. An input that
    is there needs all those before it. Raises ValueError if weights are not what format and group say.
    """
    _check(locals())
    batch, tokens, hidden = x.shape
    rows, picked = x.reshape(-1, hidden), experts.reshape(batch * tokens, -1)
    total = torch.zeros(rows.shape, dtype=torch.float32, device=x.device)
    scales = weights.reshape(batch * tokens, -1, 1)
    for e in picked.unique().tolist():
        token, slot = torch.where(picked == e)
        inputs, scale = rows[token], scales[token, slot]
        how = (e, format, group, interleaved)
        first = _matrix(gate_up, gate_up_scales, gate_up_factors, gate_up_zeros, *how)
        second = _matrix(down, down_scales, down_factors, down_zeros, *how)
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


def _matrix(
    stored: Tensor,
    scales: Tensor | None,
    factors: Tensor | None,
    zeros: Tensor | None,
    expert: int,
    format: str,
    group: int,
    interleaved: bool,
) -> Tensor:
    """That of an expert: plain as it is stored, others in fp32."""
    if scales is None:
        return stored[expert]
    wide = dequantise(format, group, stored[expert], scales[expert], None if zeros is None else zeros[expert])
    if factors is None:
        return wide
    own = factors[expert]
    rows = len(wide) // len(own)
    return wide * (own.tile(rows) if interleaved else own.repeat_interleave(rows)).unsqueeze(-1)
