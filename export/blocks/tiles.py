"""A vision tower over tiles."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmexport.export import spec
from llmexport.export.blocks.context import inverse_frequencies
from llmexport.export.blocks.norm import Norm


class TileEmbedding(nn.Module):
    def __init__(self, block: spec.TileEmbedding) -> None:
        super().__init__()
        self.block = block
        self.kernel = (block.hidden, block.channels, block.patch, block.patch)
        shape = self.kernel if block.kernel else (block.hidden, block.channels * block.patch**2)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(block.hidden)) if block.kernel else None
        self.class_token = None if block.kernel else nn.Parameter(torch.empty(block.hidden))
        self.positions = nn.Parameter(torch.empty(block.places, block.hidden))

    def forward(self, pixels: Tensor) -> Tensor:
        block, kernel = self.block, self.weight.view(self.kernel)
        seen = F.conv2d(pixels.to(kernel.dtype), kernel, self.bias, stride=block.patch).flatten(2).transpose(1, 2)
        if self.class_token is not None:
            seen = torch.cat((seen, self.class_token.expand(pixels.shape[0], 1, block.hidden)), 1)
        return seen + self.positions


class TileRotary(nn.Module):
    angles: Tensor

    def __init__(self, block: spec.TileRotary, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        side = block.side
        with torch.device("cpu"):
            steps = inverse_frequencies(spec.Rotary(block.size // 2, block.theta))
            patch = torch.arange(side**2).unsqueeze(1)
            angles = torch.cat(((patch % side + 1) * steps, (patch // side + 1) * steps), -1)
            self.register_buffer("angles", torch.cat((angles, torch.zeros_like(angles[:1]))))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.angles.cos().to(self.dtype), self.angles.sin().to(self.dtype)
        return cos.expand(pixels.shape[0], -1, -1), sin.expand(pixels.shape[0], -1, -1)


class PixelShuffle(nn.Module):
    def __init__(self, block: spec.PixelShuffle) -> None:
        super().__init__()
        self.block = block
        self.up_proj = nn.Linear(block.merge**2 * block.hidden, block.out, bias=False)
        self.down_proj = nn.Linear(block.out, block.out, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.gelu(self.down_proj(F.gelu(self.up_proj(shuffle(hidden[:, :-1], self.block)))))


def shuffle(patches: Tensor, block: spec.PixelShuffle) -> Tensor:
    """The patches [N, side * side, C] of tiles as [N, tokens, merge * merge * C], row by row within a token too."""
    across = block.side // block.merge
    grid = patches.reshape(-1, across, block.merge, across, block.merge * block.hidden)
    return grid.transpose(2, 3).reshape(-1, block.tokens, block.merge**2 * block.hidden)


class Projector(nn.Module):
    def __init__(self, block: spec.Projector) -> None:
        super().__init__()
        self.projection = nn.Linear(block.hidden, block.out, bias=False)
        self.out = block.out

    def forward(self, hidden: Tensor) -> Tensor:
        seen: Tensor = self.projection(hidden)
        return seen.reshape(-1, self.out)


class PooledProjector(nn.Module):
    def __init__(self, block: spec.PooledProjector) -> None:
        super().__init__()
        self.block = block
        self.norm = Norm(block.norm)
        self.weight = nn.Parameter(torch.empty(block.norm.size, block.out))

    def forward(self, hidden: Tensor) -> Tensor:
        block, width = self.block, self.block.norm.size
        across = block.side // block.merge
        grid = hidden.reshape(-1, across, block.merge, across, block.merge, width)
        pooled = grid.float().mean((2, 4)).to(hidden.dtype).reshape(-1, block.tokens, width)
        return (self.norm(pooled) @ self.weight).reshape(-1, block.out)
