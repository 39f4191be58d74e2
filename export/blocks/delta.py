"""The gated delta net, and its parts."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmexport.export import spec
from llmexport.plugins.causal_conv1d import causal_conv1d
from llmexport.plugins.gated_delta_rule import gated_delta_rule
from llmexport.plugins.gated_rms_norm import gated_rms_norm


class CausalConv(nn.Module):
    def __init__(self, block: spec.CausalConv) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(block.channels, 1, block.kernel))

    def forward(self, mixed: Tensor, tokens_end: Tensor, past_conv_state: Tensor) -> tuple[Tensor, Tensor]:
        return causal_conv1d(mixed, self.weight, past_conv_state, tokens_end, None, "silu")


class GatedNorm(nn.Module):
    def __init__(self, block: spec.GatedNorm) -> None:
        super().__init__()
        self.block = block
        self.weight = nn.Parameter(torch.empty(block.size))

    def forward(self, recalled: Tensor, gate: Tensor) -> Tensor:
        block = self.block
        rounded = block.rounding == "before_weight"
        return gated_rms_norm(recalled, gate, self.weight, block.epsilon, block.activation, rounded)


class GatedDeltaNet(nn.Module):
    """Parameter names are those of transformers' modeling_qwen3_5_moe.py and modeling_qwen3_next.py."""

    def __init__(self, block: spec.GatedDeltaNet) -> None:
        super().__init__()
        self.block = block
        width, channels = block.value_heads * block.value_size, block.convolution.channels
        if block.grouped:
            self.in_proj_qkvz = nn.Linear(block.hidden, channels + width, bias=False)
            self.in_proj_ba = nn.Linear(block.hidden, 2 * block.value_heads, bias=False)
        else:
            self.in_proj_qkv = nn.Linear(block.hidden, channels, bias=False)
            self.in_proj_z = nn.Linear(block.hidden, width, bias=False)
            self.in_proj_b = nn.Linear(block.hidden, block.value_heads, bias=False)
            self.in_proj_a = nn.Linear(block.hidden, block.value_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(block.value_heads))
        self.dt_bias = nn.Parameter(torch.empty(block.value_heads))
        self.conv1d = CausalConv(block.convolution)
        self.norm = GatedNorm(block.norm)
        self.out_proj = nn.Linear(width, block.hidden, bias=False)

    def forward(
        self,
        normed: Tensor,
        present_tokens: Tensor,
        tokens_end: Tensor,
        past_conv_state: Tensor,
        past_recurrent_state: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        block = self.block
        batch, sequence, _ = normed.shape
        present = present_tokens.unsqueeze(-1)
        normed = normed * present
        mixing, z, b, a = self._project(normed)
        z = z.reshape(batch, sequence, block.value_heads, block.value_size)
        past = (past_conv_state, past_recurrent_state)
        gated, conv_state, state = self.recalled(mixing, z, b, a, present_tokens, tokens_end, *past)
        return self.out_proj(gated.reshape(batch, sequence, -1)), conv_state, state

    def recalled(
        self,
        mixing: Tensor,
        z: Tensor,
        b: Tensor,
        a: Tensor,
        present_tokens: Tensor,
        tokens_end: Tensor,
        past_conv: Tensor,
        past: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the state recalls [B, T, value heads, their size], normed and gated by z, and the next states."""
        block, (batch, sequence, _) = self.block, mixing.shape
        mixed, conv_state = self.conv1d(mixing, tokens_end, past_conv)
        present = present_tokens.unsqueeze(-1)
        keys, values = block.key_heads * block.key_size, block.value_heads * block.value_size
        q, k, v = mixed.split([keys, keys, values], -1)
        q, k = (x.reshape(batch, sequence, block.key_heads, block.key_size) for x in (q, k))
        v = v.reshape(batch, sequence, block.value_heads, block.value_size)
        g = -self.A_log.float().exp() * F.softplus(a.float() + self.dt_bias.float())
        # Padding neither lets the state decay nor writes into it, though the convolution reaches into it.
        g, beta = g * present.float(), torch.sigmoid(b) * present
        y, state = gated_delta_rule(q, k, v, g, beta, past, block.key_size**-0.5, True)
        return self.norm(y, z), conv_state, state

    def _project(self, normed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k and v beside one another, the gate z, and what beta and the decay are made of."""
        if not self.block.grouped:
            q, z, b, a = (getattr(self, f"in_proj_{n}")(normed) for n in ("qkv", "z", "b", "a"))
            return q, z, b, a
        keys, together = self.block.key_heads, self.block.value_heads // self.block.key_heads
        size, width = self.block.key_size, together * self.block.value_size
        both, gates = (getattr(self, f"in_proj_{n}")(normed) for n in ("qkvz", "ba"))
        rows = both.unflatten(-1, (keys, 2 * (size + width)))
        q, k, v, z = (x.flatten(2) for x in rows.split([size, size, width, width], -1))
        b, a = (x.flatten(2) for x in gates.unflatten(-1, (keys, 2 * together)).chunk(2, -1))
        return torch.cat((q, k, v), -1), z, b, a
