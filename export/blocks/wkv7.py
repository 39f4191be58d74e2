"""The two halves of an RWKV-7 layer. Parameter names are those of published checkpoints."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmexport.export import spec
from llmexport.export.blocks.shift import shifted
from llmexport.plugins.wkv7 import wkv7

SHORTEST = 1e-12  # what a removal key is divided by at least


class DeltaTimeMix(nn.Module):
    def __init__(self, block: spec.DeltaTimeMix) -> None:
        super().__init__()
        self.block, size = block, block.hidden
        for name in "rwkvag":
            self.register_parameter(f"x_{name}", nn.Parameter(torch.empty(1, 1, size)))
        self.k_k, self.k_a = (nn.Parameter(torch.empty(size)) for _ in range(2))
        self.r_k = nn.Parameter(torch.empty(block.heads, block.size))
        self.r_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(size, size, bias=False) for _ in range(4))
        self.w_lora = LowRank(size, block.decay_rank, nn.Tanh())
        self.a_lora = LowRank(size, block.rate_rank, nn.Identity())
        self.v_lora = None if block.first else LowRank(size, block.value_rank, nn.Identity())
        self.g_lora = LowRank(size, block.gate_rank, nn.Sigmoid(), bias=False)
        self.g_norm = HeadNorm(block)

    def forward(
        self,
        normed: Tensor,
        present_tokens: Tensor,
        tokens_end: Tensor,
        *others: Tensor,
    ) -> tuple[Tensor, ...]:
        """`others` are the first layer's values, unless this is the first, and the states."""
        *first, past_time_shift, past_recurrent_state = others
        token, before, shift = shifted(normed, present_tokens, tokens_end, past_time_shift)
        delta = before - token
        at_r, at_w, at_k, at_v, at_a, at_g = (token + delta * getattr(self, f"x_{n}") for n in "rwkvag")
        r, k, v = self.r_proj(at_r), self.k_proj(at_k), self.v_proj(at_v)
        w, rate = self.w_lora(at_w), torch.sigmoid(self.a_lora(at_a))
        removal = self._by_head((k * self.k_k).float())
        kappa = removal / removal.square().sum(-1, keepdim=True).sqrt().clamp_min(SHORTEST)
        k = k * (1 + (rate - 1) * self.k_a)
        lent = () if self.v_lora else (v,)
        if self.v_lora:
            v = v + (first[0] - v) * torch.sigmoid(self.v_lora(at_v))
        r, w, k, v, rate = map(self._by_head, (r, w, k, v, rate))
        recalled, state = wkv7(r, w, k, v, kappa.to(v.dtype), rate, present_tokens, past_recurrent_state)
        bonus = (r * k * self.r_k).sum(-1, keepdim=True) * v
        mixed = (self.g_norm(recalled) + bonus.flatten(2)) * self.g_lora(at_g)
        return self.o_proj(mixed), *lent, shift, state

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.block.heads, self.block.size))


class ShiftedMlp(nn.Module):
    def __init__(self, block: spec.ShiftedMlp) -> None:
        super().__init__()
        self.x_k = nn.Parameter(torch.empty(block.hidden))
        self.key = nn.Linear(block.hidden, block.intermediate, bias=False)
        self.value = nn.Linear(block.intermediate, block.hidden, bias=False)

    def forward(
        self, normed: Tensor, present_tokens: Tensor, tokens_end: Tensor, past_channel_shift: Tensor
    ) -> tuple[Tensor, Tensor]:
        token, before, shift = shifted(normed, present_tokens, tokens_end, past_channel_shift)
        key = torch.relu(self.key(token + (before - token) * self.x_k))
        return self.value(key * key), shift


class LowRank(nn.Module):
    """A projection through few numbers a token."""

    def __init__(self, size: int, rank: int, activation: nn.Module, bias: bool = True) -> None:
        super().__init__()
        self.lora = nn.Sequential(nn.Linear(size, rank, bias=False), activation, nn.Linear(rank, size, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.lora(x)
        return made


class HeadNorm(nn.Module):
    """A LayerNorm of each head of [B, T, H, V], which gives them side by side."""

    def __init__(self, block: spec.DeltaTimeMix) -> None:
        super().__init__()
        self.size, self.epsilon = block.size, block.epsilon
        self.weight, self.bias = (nn.Parameter(torch.empty(block.hidden)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(x.float(), (self.size,), None, None, self.epsilon).flatten(2)
        return (normed * self.weight.float() + self.bias.float()).to(x.dtype)
