"""Kimi Delta Attention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmexport.export import spec
from llmexport.export.blocks.delta import GatedNorm
from llmexport.plugins.causal_conv1d import causal_conv1d
from llmexport.plugins.kimi_delta_rule import kimi_delta_rule


class KimiDeltaAttention(nn.Module):
    """Parameter names are those of published checkpoints."""

    def __init__(self, block: spec.KimiDeltaAttention) -> None:
        super().__init__()
        self.block = block
        for name in "qkv":
            self.add_module(f"{name}_proj", nn.Linear(block.hidden, block.width, bias=False))
        for name in "qkv":
            self.add_module(f"{name}_conv1d", Taps(block.width, block.kernel))
        self.f_a_proj = nn.Linear(block.hidden, block.size, bias=False)
        self.f_b_proj = nn.Linear(block.size, block.width, bias=False)
        self.A_log = nn.Parameter(torch.empty(1, 1, block.heads, 1))
        self.dt_bias = nn.Parameter(torch.empty(block.width))
        self.b_proj = nn.Linear(block.hidden, block.heads, bias=False)
        self.g_a_proj = nn.Linear(block.hidden, block.size, bias=False)
        self.g_b_proj = nn.Linear(block.size, block.width, bias=False)
        self.o_norm = GatedNorm(block.norm)
        self.o_proj = nn.Linear(block.width, block.hidden, bias=False)

    def forward(
        self,
        normed: Tensor,
        present_tokens: Tensor,
        tokens_end: Tensor,
        past_conv_state: Tensor,
        past_recurrent_state: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        block = self.block
        present = present_tokens.unsqueeze(-1)
        normed = normed * present

        def by_head(x: Tensor) -> Tensor:
            return x.unflatten(-1, (block.heads, block.size))

        mixing = torch.cat([getattr(self, f"{n}_proj")(normed) for n in "qkv"], -1)
        taps = torch.cat([getattr(self, f"{n}_conv1d").weight for n in "qkv"])
        mixed, conv_state = causal_conv1d(mixing, taps, past_conv_state, tokens_end, None, "silu")
        q, k, v = map(by_head, mixed.chunk(3, -1))
        rate = F.softplus(self.f_b_proj(self.f_a_proj(normed)).float() + self.dt_bias)
        # Padding neither lets the state decay nor writes into it, though the convolution reaches into it.
        g = -self.A_log.exp() * by_head(rate * present.float())
        beta = torch.sigmoid(self.b_proj(normed)) * present
        recalled, state = kimi_delta_rule(q, k, v, g, beta, past_recurrent_state, block.size**-0.5, True)
        gated = self.o_norm(recalled, by_head(self.g_b_proj(self.g_a_proj(normed)))).flatten(2)
        return self.o_proj(gated), conv_state, state


class Taps(nn.Module):
    """The weight of a depthwise convolution."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel))
