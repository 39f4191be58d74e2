"""The ops that passes make of an exported graph, in our PyTorch: its modules call them where the passes put them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from llmexport.export import spec
from llmexport.export.blocks.attention import Attention
from llmexport.export.blocks.delta import GatedDeltaNet
from llmexport.export.blocks.mlp import Mlp
from llmexport.export.blocks.norm import Norm
from llmexport.plugins.add_rms_norm import add_rms_norm
from llmexport.plugins.gated_act import ACTIVATIONS, gated_act
from llmexport.plugins.gated_delta_net import gated_delta_net
from llmexport.plugins.qk_norm_rope import qk_norm_rope
from llmexport.plugins.qk_norm_rope_write import qk_norm_rope_write

QK_NORM_ROPE, WRITE, GATED_DELTA_NET = qk_norm_rope.name, qk_norm_rope_write.name, gated_delta_net.name


class Sums(TorchDispatchMode):
    """Remembers the last sum of two hidden states: the norm that reads it next takes their place in one op."""

    def __init__(self) -> None:
        super().__init__()
        self._last: tuple[Tensor, Tensor, Tensor] | None = None
        # The last norm of its own: what it made, and of what.
        self.normed: tuple[Tensor, Tensor, Norm] | None = None

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


def fuse(module: nn.Module, sums: Sums, made: Collection[str]) -> None:
    """From now on `module` computes AddRmsNorm and GatedAct as ops, within `sums`; and QkNormRope, QkNormRopeWrite and
    GatedDeltaNet, if they are among the ops that were `made` of the graph."""
    for part in module.modules():
        if isinstance(part, Attention) and _turns(part.block):
            if part.block.scatters and WRITE in made:
                part.heads_first = partial(_written, part)
                # The op's keys and values are those of the cache.
                part.seen = lambda key, value, given: (key, value)
            elif QK_NORM_ROPE in made:
                part.heads_first = partial(_heads_first, part, qk_norm_rope)
        if isinstance(part, GatedDeltaNet) and GATED_DELTA_NET in made:
            part.recalled = partial(_recalled, part)
        if isinstance(part, Mlp) and part.block.gated and part.block.activation in ACTIVATIONS:
            if part.block.fused:
                part.mixed = partial(_mixed, part)
            else:
                part.activation = partial(_Gate, activation=part.block.activation)
        if isinstance(part, Norm) and part.block.statistics == "rms" and part.block.rows is None:
            part.forward = partial(_normed, part, sums, part.forward)


def _mixed(mlp: Mlp, normed: Tensor) -> Tensor:
    return gated_act(mlp.gate_up_proj(normed), None, mlp.block.activation, 0.0, 0.0)


def _turns(block: spec.Attention) -> bool:
    """Whether the pass makes the op of what q and k of this step go through."""
    known = block.qk_norm is None or block.qk_norm_place == "before_rotary" or _is_the_ops(block)
    return block.turned > 0 and not block.halves and not block.borrows and known


def _is_the_ops(block: spec.Attention) -> bool:
    """Whether the op has the norm of q and k."""
    return block.qk_norm is not None and block.qk_norm.statistics == "rms" and block.qk_norm_over == "head"


def _written(
    attention: Attention, q: Tensor, k: Tensor, v: Tensor, given: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    past_key, past_value, first = attention.slots(given)

    def op(*read: Any) -> tuple[Tensor, Tensor, Tensor]:
        cache = (past_key, past_value, first.to(torch.int32))
        made: tuple[Tensor, Tensor, Tensor] = qk_norm_rope_write(*read[:5], *cache, *read[5:])
        return made

    return _heads_first(attention, op, q, k, v, given)


def _heads_first(
    attention: Attention,
    op: Callable[..., tuple[Tensor, Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    given: dict[str, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """What the op, QkNormRope or one that reads a cache besides, makes of q, k and v."""
    block = attention.block
    norm, first = block.qk_norm, block.qk_norm_place == "before_rotary"
    angles = attention.angles(given)
    if norm and _is_the_ops(block):
        weights = [attention.get_submodule(n).weight.to(q.dtype) for n in ("q_norm", "k_norm")]
        early = norm.rounding == "before_weight" and norm.weighted
        numbers = (norm.epsilon, norm.offset, early, first)
        return op(_where_it_lies(q), k, v, *angles, *weights, block.interleaved, *numbers)
    # A norm of another kind is computed where it is.
    if norm:
        q, k = attention.normed(q, "q_norm"), attention.normed(k, "k_norm")
    return op(_where_it_lies(q), k, v, *angles, None, None, block.interleaved, 0.0, 0.0, False, True)


def _where_it_lies(q: Tensor) -> Tensor:
    """[B, T, heads, D] with what lies behind each head, as the op reads it."""
    return q.as_strided((*q.shape[:-1], q.stride(-2)), q.stride())


def _recalled(
    net: GatedDeltaNet,
    mixing: Tensor,
    z: Tensor,
    b: Tensor,
    a: Tensor,
    present_tokens: Tensor,
    tokens_end: Tensor,
    past_conv: Tensor,
    past: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    norm = net.norm.block
    weights = [w.to(mixing.dtype) for w in (net.A_log, net.dt_bias, net.norm.weight)]
    convolution = (net.conv1d.weight.to(mixing.dtype), past_conv, tokens_end)
    numbers = (net.block.key_size**-0.5, True, norm.epsilon, norm.activation, norm.rounding == "before_weight")
    return gated_delta_net(mixing, *convolution, a, b, present_tokens, *weights[:2], z, weights[2], past, *numbers)


def _normed(norm: Norm, sums: Sums, alone: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    summands = sums.summands(hidden)
    if summands is None:
        made = alone(hidden)
        sums.normed = (made, hidden, norm)
        return made
    x, residual, inner = *summands, None
    if sums.normed and _numbers(sums.normed[2]) == _numbers(norm):
        made, source, before = sums.normed
        if made is x or made is residual:
            x, residual, inner = source, residual if made is x else x, before.weight
    y, total = add_rms_norm(x, residual, norm.weight, inner, *_numbers(norm))
    # Whoever reads the sum later reads the op's.
    hidden.copy_(total)
    return y


def _numbers(norm: Norm) -> tuple[float, float, bool]:
    """Epsilon, offset, and whether it rounds before the weight."""
    block = norm.block
    return block.epsilon, block.offset, block.rounding == "before_weight" and block.weighted
