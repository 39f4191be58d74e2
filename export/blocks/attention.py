"""RoPE's angles, the attention mask and attention itself."""

import math

import torch
from torch import Tensor, nn

from llmexport.export import spec
from llmexport.export.blocks.standard import attention
from llmexport.plugins.rope import rope


def inverse_frequencies(block: spec.Rotary) -> Tensor:
    """RoPE's angular step per position [size / 2], fp32, as transformers' modeling_rope_utils.py computes it."""
    exponents = torch.arange(0, block.size, 2, dtype=torch.int64).float() / block.size
    steps = 1.0 / (block.theta**exponents)
    match block.scaling:
        case None:
            return steps
        case spec.LinearScaling(factor):
            return steps / factor
        case spec.Llama3Scaling(factor, low, high, positions):
            wavelengths = 2 * math.pi / steps
            # 0 where the wavelength is longer than the low limit, 1 where it is shorter than the high one.
            smooth = (positions / wavelengths - low) / (high - low)
            blended = (1 - smooth) * (steps / factor) + smooth * steps
            long, short = wavelengths > positions / low, wavelengths < positions / high
            return torch.where(long, steps / factor, torch.where(short, steps, blended))
    raise TypeError(f"no RoPE scaling {block.scaling}")


class Rotary(nn.Module):
    steps: Tensor

    def __init__(self, block: spec.Rotary, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        with torch.device("cpu"):
            self.register_buffer("steps", inverse_frequencies(block))

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids.unsqueeze(-1).float() * self.steps
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)


class Mask(nn.Module):
    def __init__(self, block: spec.Mask) -> None:
        super().__init__()
        self.window = block.window

    def forward(self, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        total, sequence = attention_mask.shape[1], position_ids.shape[1]
        keys = torch.arange(total, device=attention_mask.device)
        queries = torch.arange(sequence, device=attention_mask.device) + (total - sequence)
        distance = queries.unsqueeze(1) - keys
        visible = torch.logical_and((attention_mask != 0).unsqueeze(1), distance >= 0)
        if self.window is not None:
            visible = torch.logical_and(visible, distance < self.window)
        return torch.logical_or(visible, distance == 0).unsqueeze(1)


class Attention(nn.Module):
    def __init__(self, block: spec.Attention) -> None:
        super().__init__()
        self.block = block
        hidden, size = block.hidden, block.head_size
        self.q_proj = nn.Linear(hidden, block.heads * size, bias=block.qkv_bias)
        self.k_proj = nn.Linear(hidden, block.kv_heads * size, bias=block.qkv_bias)
        self.v_proj = nn.Linear(hidden, block.kv_heads * size, bias=block.qkv_bias)
        self.o_proj = nn.Linear(block.heads * size, hidden, bias=block.out_bias)

    def forward(
        self, normed: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past_key: Tensor, past_value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        q = rope(self._heads(self.q_proj(normed)), cos, sin, False)
        k = rope(self._heads(self.k_proj(normed)), cos, sin, False)
        key = torch.cat((past_key, k), 2)
        value = torch.cat((past_value, self._heads(self.v_proj(normed))), 2)
        mixed = attention(q, key, value, mask, self.block.head_size**-0.5)
        batch, sequence, _ = normed.shape
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, sequence, -1)), key, value

    def _heads(self, x: Tensor) -> Tensor:
        """[B, T, H * D] -> [B, H, T, D]"""
        batch, sequence, width = x.shape
        size = self.block.head_size
        return x.view(batch, sequence, width // size, size).transpose(1, 2)
