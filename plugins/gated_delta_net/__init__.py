"""GatedDeltaNet: the gated delta rule with the convolution and the gates before it, and the gated norm behind."""

import torch
import torch.nn.functional as F
from torch import Tensor

from llmexport.plugins.causal_conv1d import causal_conv1d
from llmexport.plugins.gated_delta_net.body import body
from llmexport.plugins.gated_delta_rule import gated_delta_rule
from llmexport.plugins.gated_rms_norm import gated_rms_norm
from llmexport.plugins.spec import op


def fake(
    mixed: Tensor,
    conv_weight: Tensor,
    conv_state: Tensor,
    end: Tensor,
    a: Tensor,
    b: Tensor,
    present: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    z: Tensor,
    norm_weight: Tensor,
    state: Tensor,
    scale: float,
    l2_norm: bool,
    epsilon: float,
    activation: str,
    round_before_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(z), torch.empty_like(conv_state), torch.empty_like(state)


@op(
    "GatedDeltaNet",
    version=1,
    dims={
        "mixed": "B T C",
        "conv_weight": "C O K",
        "conv_state": "B S C",
        "end": "B",
        "a": "B T H",
        "b": "B T H",
        "present": "B T",
        "a_log": "H",
        "dt_bias": "H",
        "z": "B T H V",
        "norm_weight": "V",
        "state": "B H D V",
    },
    outputs={"gated": "B T H V", "next_conv_state": "B S C", "next_state": "B H D V"},
    static=("C", "O", "K", "S", "H", "D", "V"),
    types={"end": "int32", "state": "float32", "next_state": "float32"},
    choices={"activation": ("silu", "sigmoid")},
    joins=("mixed", "a", "b", "z"),
    body=body,
    fake=fake,
)
def gated_delta_net(
    mixed: Tensor,
    conv_weight: Tensor,
    conv_state: Tensor,
    end: Tensor,
    a: Tensor,
    b: Tensor,
    present: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    z: Tensor,
    norm_weight: Tensor,
    state: Tensor,
    scale: float,
    l2_norm: bool,
    epsilon: float,
    activation: str,
    round_before_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """CausalConv1d, GatedDeltaRule and GatedRmsNorm of a gated delta net in one (modeling_qwen3_5_moe.py).

    mixed [B, T, C] holds q and k of G heads of D and v of H heads of V beside one another, C = 2 G D + H V, before a
    convolution with SiLU by conv_weight [C, 1, K]; conv_state [B, K - 1, C], end [B] int32 and next_conv_state are
    CausalConv1d's. g is -exp(a_log) softplus(a + dt_bias) in fp32, beta sigmoid(b) rounded to b's dtype, a, b [B, T, H]
    and a_log, dt_bias [H]; present [B, T], 1 for a token and 0 for padding, multiplies both. What GatedDeltaRule makes
    of them and of state [B, H, D, V] fp32 is rounded to z's dtype, then normed and gated by z [B, T, H, V] as
    GatedRmsNorm does. scale and l2_norm are the former's, the other attributes the latter's. Raises ValueError as these
    do.
    """
    heads, size, width = state.shape[1:]
    values = heads * width
    keys = (mixed.shape[-1] - values) // 2
    mixed, next_conv_state = causal_conv1d.reference(mixed, conv_weight, conv_state, end, None, "silu")
    q, k, v = mixed.split([keys, keys, values], -1)
    q, k, v = (x.unflatten(-1, (-1, n)) for x, n in ((q, size), (k, size), (v, width)))
    shown = present.unsqueeze(-1)
    g = -a_log.float().exp() * F.softplus(a.float() + dt_bias.float()) * shown.float()
    y, state = gated_delta_rule.reference(q, k, v, g, torch.sigmoid(b) * shown, state, scale, l2_norm)
    gated = gated_rms_norm.reference(y, z, norm_weight, epsilon, activation, round_before_weight)
    return gated, next_conv_state, state
