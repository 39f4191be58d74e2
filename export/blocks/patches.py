"""A vision tower over packed patches."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmexport.export import spec
from llmexport.export.blocks.context import inverse_frequencies
from llmexport.export.blocks.norm import Norm


class PatchEmbedding(nn.Module):
    def __init__(self, block: spec.PatchEmbedding) -> None:
        super().__init__()
        self.block = block
        self.weight = nn.Parameter(torch.empty(block.hidden, block.channels, *block.kernel))
        self.bias = nn.Parameter(torch.empty(block.hidden))

    def forward(self, pixels: Tensor) -> Tensor:
        block = self.block
        patches = pixels.to(self.weight.dtype).view(-1, block.channels, *block.kernel)
        seen = F.conv3d(patches, self.weight, self.bias, stride=block.kernel)
        return seen.view(1, -1, block.hidden)


class PatchPlaces(nn.Module):
    def __init__(self, block: spec.PatchPlaces) -> None:
        super().__init__()
        self.merge = block.merge

    def forward(self, pixels: Tensor, grid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        merge = self.merge
        frames, rows, columns = grid.unbind(1)
        held = frames * rows * columns
        ends = held.cumsum(0)
        patch = torch.arange(pixels.shape[0], device=pixels.device)
        picture = (patch.unsqueeze(1) >= ends).to(torch.int64).sum(1)
        rows, columns = rows.index_select(0, picture), columns.index_select(0, picture)
        patch = patch - (ends - held).index_select(0, picture)
        segments = (frames.cumsum(0) - frames).index_select(0, picture) + patch // (rows * columns)
        patch = patch % (rows * columns)
        group, within = patch // merge**2, patch % merge**2
        across = columns // merge
        places = (group // across * merge + within // merge, group % across * merge + within % merge)
        return torch.stack(places), torch.stack((rows, columns)), segments


class PatchPositions(nn.Module):
    def __init__(self, block: spec.PatchPositions) -> None:
        super().__init__()
        self.side = block.side
        self.weight = nn.Parameter(torch.empty(block.side**2, block.hidden))

    def forward(self, hidden: Tensor, places: Tensor, extents: Tensor) -> Tensor:
        at = places.float() * (self.side - 1) / (extents - 1).clamp(min=1).float()
        low = at.floor()
        share, low = at - low, low.to(torch.int64)
        high = (low + 1).clamp(max=self.side - 1)
        taken = torch.zeros_like(hidden[0], dtype=torch.float32)
        for row, of_row in ((low[0], 1 - share[0]), (high[0], share[0])):
            for column, of_column in ((low[1], 1 - share[1]), (high[1], share[1])):
                near = F.embedding(row * self.side + column, self.weight)
                taken = taken + near.float() * (of_row * of_column).unsqueeze(1)
        return hidden + taken.to(hidden.dtype)


class PatchRotary(nn.Module):
    steps: Tensor

    def __init__(self, block: spec.PatchRotary, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        with torch.device("cpu"):
            self.register_buffer("steps", inverse_frequencies(spec.Rotary(block.size // 2, block.theta)))

    def forward(self, places: Tensor) -> tuple[Tensor, Tensor]:
        angles = places.unsqueeze(-1).float() * self.steps
        angles = torch.cat((angles[0], angles[1]), -1).unsqueeze(0)
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)


class SegmentMask(nn.Module):
    def __init__(self, block: spec.SegmentMask) -> None:
        super().__init__()

    def forward(self, segments: Tensor) -> Tensor:
        return (segments.unsqueeze(1) == segments)[None, None]


class PatchMerger(nn.Module):
    def __init__(self, block: spec.PatchMerger) -> None:
        super().__init__()
        self.norm = Norm(block.norm)
        self.width = block.norm.size * block.merge**2
        self.up_proj = nn.Linear(self.width, self.width)
        self.down_proj = nn.Linear(self.width, block.out)

    def forward(self, hidden: Tensor) -> Tensor:
        merged = self.norm(hidden).view(-1, self.width)
        seen: Tensor = self.down_proj(F.gelu(self.up_proj(merged)))
        return seen
