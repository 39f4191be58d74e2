"""The two halves of an RWKV-4 layer. Parameter names are those of transformers' modeling_rwkv.py."""

import torch
from torch import Tensor, nn

from llmexport.export import spec
from llmexport.export.blocks.linear import times
from llmexport.export.blocks.shift import shifted
from llmexport.plugins.wkv import wkv


class TimeMix(nn.Module):
    def __init__(self, block: spec.TimeMix) -> None:
        super().__init__()
        self.scale, size = block.scale, block.hidden
        self.time_decay, self.time_first = (nn.Parameter(torch.empty(size)) for _ in range(2))
        self.time_mix_key, self.time_mix_value, self.time_mix_receptance = (_weights(size) for _ in range(3))
        self.key, self.value, self.receptance, self.output = (nn.Linear(size, size, bias=False) for _ in range(4))

    def forward(
        self,
        normed: Tensor,
        present_tokens: Tensor,
        tokens_end: Tensor,
        past_time_shift: Tensor,
        past_numerator: Tensor,
        past_denominator: Tensor,
        past_maximum: Tensor,
    ) -> tuple[Tensor, ...]:
        token, before, shift = shifted(normed, present_tokens, tokens_end, past_time_shift)
        key = self.key(_mixed(token, before, self.time_mix_key))
        value = self.value(_mixed(token, before, self.time_mix_value))
        receptance = torch.sigmoid(self.receptance(_mixed(token, before, self.time_mix_receptance)))
        states = (past_numerator, past_denominator, past_maximum)
        mean, *sums = wkv(key, value, present_tokens, self.time_decay, self.time_first, *states)
        return self.output(times(receptance * mean, self.scale)), shift, *sums


class ChannelMix(nn.Module):
    def __init__(self, block: spec.ChannelMix) -> None:
        super().__init__()
        self.scale, size = block.scale, block.hidden
        self.time_mix_key, self.time_mix_receptance = (_weights(size) for _ in range(2))
        self.key = nn.Linear(size, block.intermediate, bias=False)
        self.receptance = nn.Linear(size, size, bias=False)
        self.value = nn.Linear(block.intermediate, size, bias=False)

    def forward(
        self, normed: Tensor, present_tokens: Tensor, tokens_end: Tensor, past_channel_shift: Tensor
    ) -> tuple[Tensor, Tensor]:
        token, before, shift = shifted(normed, present_tokens, tokens_end, past_channel_shift)
        key = torch.relu(self.key(_mixed(token, before, self.time_mix_key)))
        receptance = torch.sigmoid(self.receptance(_mixed(token, before, self.time_mix_receptance)))
        return receptance * self.value(times(key * key, self.scale)), shift


def _weights(size: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(1, 1, size))


def _mixed(token: Tensor, before: Tensor, weight: Tensor) -> Tensor:
    return token * weight + before * (1 - weight)
