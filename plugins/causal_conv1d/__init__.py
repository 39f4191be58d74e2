"""CausalConv1d: depthwise causal convolution over time that carries its last inputs as a state."""

import torch
import torch.nn.functional as F
from torch import Tensor

from llmexport.plugins.causal_conv1d.body import by_operator
from llmexport.plugins.spec import op


@op(
    "CausalConv1d",
    version=1,
    dims={"x": "B T C", "weight": "C O K", "state": "B S C", "end": "B", "bias": "C"},
    outputs={"y": "B T C", "next_state": "B S C"},
    static=("C", "O", "K", "S"),
    types={"end": "int32"},
    choices={"activation": ("none", "silu")},
    joins=("x",),
    bodies={"onnxruntime": by_operator},
)
def causal_conv1d(
    x: Tensor, weight: Tensor, state: Tensor, end: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """y[t] = activation(bias + sum over i of weight[i] * x[t - K + 1 + i]), each channel by itself.

    x [B, T, C]; weight [C, 1, K] as nn.Conv1d keeps it; state [B, K - 1, C] holds the inputs before x, oldest first,
    zeros at the beginning of a sequence. Behind token end [B] int32, from 0 to T, a row has only padding: next_state
    holds the K - 1 inputs before it, however short x is. The sum is in fp32 and rounded to x's dtype, then activated.
    activation is "none" or "silu". Where end is T the op is CausalConvWithState of ai.onnx 27, in [B, T, C]. Raises
    ValueError on any other activation.
    """
    if activation not in ("none", "silu"):
        raise ValueError(f"CausalConv1d knows no activation {activation!r}")
    seen = torch.cat((state, x), 1)
    # A sum of shifted products: runtimes run one convolution of C groups as C convolutions.
    wide, taps = seen.float(), weight[:, 0].float().unbind(-1)
    total = sum((wide[:, i : i + x.shape[1]] * tap for i, tap in enumerate(taps)), start=torch.zeros(()))
    y = (total if bias is None else total + bias.float()).to(x.dtype)
    if activation == "silu":
        y = F.silu(y.float()).to(x.dtype)
    places = end.reshape(-1, 1, 1) + torch.arange(state.shape[1], dtype=torch.int32, device=x.device).unsqueeze(-1)
    return y, seen.gather(1, places.long().expand(-1, -1, x.shape[2]))
