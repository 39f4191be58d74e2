"""The ops that passes make of an exported graph, in our PyTorch: its modules call them where the passes put them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from llmexport.export.blocks.mlp import Mlp
from llmexport.export.blocks.norm import Norm
from llmexport.plugins.add_rms_norm import add_rms_norm
from llmexport.plugins.gated_act import ACTIVATIONS, gated_act


class Sums(TorchDispatchMode):
    """Remembers the last sum of two hidden states: the norm that reads it next takes their place in one op."""

    def __init__(self) -> None:
        super().__init__()
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.add.Tensor and not kwargs and all(_hidden(a, made) for a in args):
            self._last = (made, *args)
        return made

    def summands(self, total: Tensor) -> tuple[Tensor, Tensor] | None:
        """What `total` is the sum of, if nothing was summed since."""
        return self._last[1:] if self._last and self._last[0] is total else None


def _hidden(summand: Any, total: Tensor) -> bool:
    alike = isinstance(summand, Tensor) and (summand.shape, summand.dtype) == (total.shape, total.dtype)
    return alike and total.ndim == 3


@dataclass(frozen=True)
class _Gate:
    """A gate whose activation waits for what it is multiplied by."""

    gate: Tensor
    activation: str

    def __mul__(self, up: Tensor) -> Tensor:
        return gated_act(self.gate, up, self.activation, 0.0, 0.0)


def fuse(module: nn.Module, sums: Sums) -> None:
    """From now on `module` computes AddRmsNorm and GatedAct as ops, within `sums`."""
    for part in module.modules():
        if isinstance(part, Mlp) and part.block.gated and part.block.activation in ACTIVATIONS:
            part.activation = partial(_Gate, activation=part.block.activation)
        if isinstance(part, Norm) and part.block.statistics == "rms" and part.block.rows is None:
            part.forward = partial(_normed, part, sums, part.forward)


def _normed(norm: Norm, sums: Sums, alone: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    summands = sums.summands(hidden)
    if summands is None:
        return alone(hidden)
    block = norm.block
    early = block.rounding == "before_weight" and block.weighted
    y, total = add_rms_norm(*summands, norm.weight, block.epsilon, block.offset, early)
    # Whoever reads the sum later reads the op's.
    hidden.copy_(total)
    return y
