"""A residual layer."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmexport.export import spec
from llmexport.export.blocks.linear import times
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
        self.layer_scalar = nn.Parameter(torch.empty(1)) if block.scaled else None

    def forward(self, hidden: Tensor, *read: Tensor) -> Tensor | tuple[Tensor, ...]:
        """`read` is what the sublayers read besides hidden states, in the order of the layer's ports."""
        given = dict(zip(self.ports[1:], read, strict=True))
        entered, parallel = hidden, self.block.parallel
        normed = first = self._norm(self.block.sublayers[0], "input_norm", entered)
        others: list[Tensor] = []
        for i, sublayer in enumerate(self.block.sublayers):
            if i:
                own = sublayer.input_norm or not parallel
                normed = self._norm(sublayer, "input_norm", entered if parallel else hidden) if own else first
            made = getattr(self, sublayer.name)(normed, *(given[p.name] for p in sublayer.block.inputs[1:]))
            mixed, *more = made if isinstance(made, tuple) else (made,)
            others += more
            mixed = self._norm(sublayer, "output_norm", mixed)
            kept = normed if sublayer.from_normed else hidden
            total = times(kept, sublayer.kept) + times(mixed, sublayer.scale)
            hidden = self._norm(sublayer, "sum_norm", total)
        hidden = hidden if self.layer_scalar is None else hidden * self.layer_scalar
        return (hidden, *others) if others else hidden

    def _norm(self, sublayer: spec.Sublayer, place: str, x: Tensor) -> Tensor:
        name = f"{sublayer.name}_{place}"
        return getattr(self, name)(x) if name in sublayer.norms else x
