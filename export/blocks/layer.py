"""A residual layer."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmexport.export import spec
from llmexport.export.blocks.norm import Norm


class Layer(nn.Module):
    def __init__(self, block: spec.Layer, make: Callable[[spec.Block, torch.dtype], nn.Module], dtype: torch.dtype):
        """`make` gives the module of a block."""
        super().__init__()
        self.block = block
        self.ports = [p.name for p in block.inputs]
        for sublayer in block.sublayers:
            self.add_module(sublayer.name, make(sublayer.block, dtype))
            for name, norm in sublayer.norms.items():
                self.add_module(name, Norm(norm))

    def forward(self, hidden: Tensor, *read: Tensor) -> Tensor | tuple[Tensor, ...]:
        """`read` is what the sublayers read besides hidden states, in the order of the layer's ports."""
        given = dict(zip(self.ports[1:], read, strict=True))
        normed = self._norm(self.block.sublayers[0], "input_norm", hidden)
        others: list[Tensor] = []
        for i, sublayer in enumerate(self.block.sublayers):
            if i and not self.block.parallel:
                normed = self._norm(sublayer, "input_norm", hidden)
            made = getattr(self, sublayer.name)(normed, *(given[p.name] for p in sublayer.block.inputs[1:]))
            mixed, *more = made if isinstance(made, tuple) else (made,)
            others += more
            hidden = self._norm(sublayer, "sum_norm", hidden + self._norm(sublayer, "output_norm", mixed))
        hidden = hidden if self.block.scale == 1.0 else hidden * self.block.scale
        return (hidden, *others) if others else hidden

    def _norm(self, sublayer: spec.Sublayer, place: str, x: Tensor) -> Tensor:
        name = f"{sublayer.name}_{place}"
        return getattr(self, name)(x) if name in sublayer.norms else x
