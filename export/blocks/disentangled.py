"""Disentangled attention, and the distances that it reads."""

import torch
from torch import Tensor, nn

from llmexport.export import spec
from llmexport.export.blocks.norm import Norm
from llmexport.export.blocks.standard import attention


def log_buckets(span: int, most: int) -> Tensor:
    """The bucket of each distance from -most to most, in fp32 as modeling_deberta_v2.py counts them [2 * most + 1]."""
    distance = torch.arange(-most, most + 1)
    middle = span // 2
    apart = torch.where(distance.abs() < middle, middle - 1, distance.abs())
    steps = torch.log(apart / middle) / torch.log(torch.tensor((most - 1) / middle)) * (middle - 1)
    far = (torch.ceil(steps) + middle) * distance.sign()
    return torch.where(apart <= middle, distance, far.to(torch.int64))


class RelativePositions(nn.Module):
    buckets: Tensor

    def __init__(self, block: spec.RelativePositions) -> None:
        super().__init__()
        self.span, self.most = block.span, block.most_apart
        self.weight = nn.Parameter(torch.empty(2 * block.span, block.hidden))
        self.norm = Norm(block.norm) if block.norm else None
        if self.most:
            with torch.device("cpu"):
                self.register_buffer("buckets", log_buckets(block.span, self.most))

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        distance = places.unsqueeze(1) - places
        if self.most:
            distance = self.buckets[distance.clamp(-self.most, self.most) + self.most]
        table = self.norm(self.weight) if self.norm else self.weight.clone()
        return table, (distance + self.span).clamp(0, 2 * self.span - 1)


class DisentangledAttention(nn.Module):
    def __init__(self, block: spec.DisentangledAttention) -> None:
        super().__init__()
        self.block = block
        hidden, width = block.hidden, block.heads * block.head_size
        if block.fused:
            self.qkv_proj = nn.Linear(hidden, 3 * width, bias=False)
            self.q_bias, self.v_bias = (nn.Parameter(torch.empty(width)) for _ in range(2))
        else:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(hidden, width) for _ in range(3))
        if block.to_position and not block.shared:
            self.position_k_proj = nn.Linear(hidden, width, bias=not block.fused)
        if block.from_position and not block.shared:
            self.position_q_proj = nn.Linear(hidden, width)
        self.o_proj = nn.Linear(width, hidden)
        self.names = [p.name for p in block.context]

    def forward(self, normed: Tensor, *read: Tensor) -> Tensor:
        block, given = self.block, dict(zip(self.names, read, strict=True))
        q, k, v = (x.unflatten(-1, (block.heads, block.head_size)).transpose(1, 2) for x in self._project(normed))
        tokens = given["attention_mask"] != 0
        query, key = tokens.unsqueeze(1).unsqueeze(-1), tokens.unsqueeze(1).unsqueeze(1)
        lowest = torch.finfo(q.dtype).min
        bias = torch.where(key, self._relative(q, k, given) if block.placed else torch.zeros_like(q[..., :1]), lowest)
        # A padding token scores all keys alike, itself and tokens too.
        present = query.to(q.dtype)
        mixed = attention(q * present, k, v, bias * present, block.scale)
        attended: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return attended

    def _project(self, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as [B, T, H * D]."""
        block = self.block
        if not block.fused:
            return self.q_proj(normed), self.k_proj(normed), self.v_proj(normed)
        heads = self.qkv_proj(normed).unflatten(-1, (block.heads, 3, block.head_size))
        q, k, v = (x.flatten(2) for x in heads.split(1, -2))
        return q + self.q_bias, k, v + self.v_bias

    def _relative(self, q: Tensor, k: Tensor, given: dict[str, Tensor]) -> Tensor:
        """What distances add to the logits [B, H, T, T]."""
        block, table = self.block, given["relative"]
        batch, heads, sequence, _ = q.shape
        rows = given["apart"].expand(batch, heads, sequence, sequence)
        total = None
        if block.to_position:
            keys = self._heads((self.k_proj if block.shared else self.position_k_proj)(table))
            total = torch.gather(q @ keys.transpose(1, 2), 3, rows)
        if block.from_position:
            queries = self._heads((self.q_proj if block.shared else self.position_q_proj)(table))
            found = torch.gather(queries @ k.transpose(2, 3), 2, rows)
            total = found if total is None else total + found
        assert total is not None
        return total * block.scale

    def _heads(self, rows: Tensor) -> Tensor:
        """[R, H * D] as [H, R, D]."""
        return rows.unflatten(-1, (self.block.heads, self.block.head_size)).transpose(0, 1)
