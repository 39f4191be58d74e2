"""What bench_ops.py times of KimiDeltaRule: prefill and decode of a real model, and who else can do the same."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from delta_rule_cases import DECODE, DECODE_TARGETS, DeltaRuleCase, Layer, Peer, called

from llmexport.plugins.kimi_delta_rule import kimi_delta_rule

LAYERS = (Layer("Kimi-Linear-48B-A3B", 32, 32, 128, 128),)
PREFILL = 4096


@dataclass(frozen=True)
class KimiDeltaCase(DeltaRuleCase):
    """A case of GatedDeltaRule, each of whose heads has its own q and k and a decay for each channel of them."""

    op: str = "KimiDeltaRule"
    chunk: int = 16

    @property
    def bytes(self) -> int:
        layer = self.layer
        return super().bytes + self.B * self.T * 4 * layer.H * (layer.D - 1)

    @property
    def target(self) -> float:
        """None was set for a prompt: its chunks wait for each other."""
        return DECODE_TARGETS[self.B] if self.T == 1 else 0.0

    def on(self, device: str) -> list[torch.Tensor]:
        q, k, v, _, beta, state = super().on(device)
        return [q, k, v, -F.softplus(torch.randn(k.shape, device=device)), beta, state]

    def results(self) -> list[torch.Tensor]:
        """The outputs' shapes and types, without values."""
        return list(kimi_delta_rule(*self.on("meta"), **self.attributes))

    def reference(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return kimi_delta_rule.reference(*inputs, **self.attributes)

    def peers(self) -> dict[str, Peer]:
        """Others that compute the same, by name; each takes the case's inputs."""
        found = {"transformers": torch_rule(self)}
        if importlib.util.find_spec("fla"):
            found["fla"] = fla_rule(self)
        return found


def cases() -> Iterator[KimiDeltaCase]:
    for layer in LAYERS:
        yield KimiDeltaCase(layer, 1, PREFILL)
        yield from (KimiDeltaCase(layer, batch, 1) for batch in DECODE)


def torch_rule(case: KimiDeltaCase) -> Peer:
    """What Kimi Linear in transformers falls back to without fla."""
    from transformers.models.kimi_linear import modeling_kimi_linear as model

    rule: Any = model.chunk_kimi_delta_attention if case.T > 1 else model.recurrent_kimi_delta_attention
    # Unwrapped, as with fla installed it would be fla.
    return called(inspect.unwrap(rule))


def fla_rule(case: KimiDeltaCase) -> Peer:
    from fla.ops.kda import chunk_kda, fused_recurrent_kda

    return called(chunk_kda if case.T > 1 else fused_recurrent_kda)
