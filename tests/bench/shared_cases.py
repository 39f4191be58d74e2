"""What bench_ops.py times of experts of which one is shared: as one of them that every token has; and as an MLP by
torch's products, beside the routed ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from expert_cases import DECODE, LAYERS, PREFILL, Call, ExpertCase, Layer, Peer, copy_of_touched
from gpu_clock import Ceilings
from normed_cases import plugin

from llmexport.plugins.normed import EXPERTS
from llmexport.plugins.spec import Attribute

# From 6 to 250 MB of a shared expert.
SHARED_BESIDE = (
    *(x for x in LAYERS if x.family in ("Qwen3.5-35B-A3B", "Llama-4-Scout", "GLM-4.5-Air")),
    Layer("GLM-4.5", 5120, 1536, 160, 8),
)


@dataclass(frozen=True)
class SharedCase:
    """`routed` experts, and one more that every token has."""

    routed: ExpertCase
    op: str = EXPERTS
    # The experts' two, and what an MLP beside them makes.
    roundings: int = 4

    @property
    def family(self) -> str:
        return f"{self.routed.family} shared"

    @property
    def B(self) -> int:
        return self.routed.B

    @property
    def T(self) -> int:
        return self.routed.T

    @property
    def experts(self) -> ExpertCase:
        """All of them."""
        layer = self.routed.layer
        return replace(self.routed, layer=replace(layer, E=layer.E + 1, K=layer.K + 1))

    @property
    def attributes(self) -> dict[str, Attribute]:
        return self.routed.attributes

    @property
    def bytes(self) -> int:
        layer = self.routed.layer
        return self.routed.bytes + int(3 * layer.C * layer.I * layer.weight_bytes)

    def floor(self, ceilings: Ceilings) -> float:
        """Seconds below which it cannot be."""
        return max(self.bytes / ceilings.read, self.experts.flops / ceilings.gemm)

    @property
    def target(self) -> float:
        return self.routed.target

    def on(self, device: str) -> list[torch.Tensor]:
        x, weights, _, *matrices = self.experts.on(device)
        layer = self.routed.layer
        chosen = torch.rand(self.B, self.T, layer.E, device=device).topk(layer.K).indices.int()
        weights[..., -1] = 1
        return [x, weights, torch.cat((chosen, torch.full_like(chosen[..., :1], layer.E)), -1), *matrices]

    def inputs(self) -> list[torch.Tensor]:
        return self.on("cuda")

    def outputs(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return self.experts.outputs(inputs)

    def checked(self, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
        """What the reference says, beside what was found."""
        return self.experts.checked(inputs, outputs)

    def apart(self, inputs: list[torch.Tensor]) -> list[Call | tuple[Any, list[torch.Tensor], list[torch.Tensor]]]:
        """Calls, and what plugins are given, that give as much one after another; the last makes the result."""
        x, weights, chosen, gate_up, down = inputs
        layer = self.routed.layer
        first, second = (m[layer.E] if layer.transposed else m[layer.E].T for m in (gate_up, down))
        routed = [t[..., : layer.K].contiguous() for t in (weights, chosen)]
        made, total = (torch.empty_like(x) for _ in range(2))
        both, middle = (x.new_empty(self.B, self.T, n * layer.I) for n in (2, 1))
        rows = [t.flatten(0, 1) for t in (made, middle)]
        act = {n: self.attributes[n] for n in ("activation", "alpha", "limit")}
        return [
            (plugin(EXPERTS, self.attributes), [x, *routed, gate_up[: layer.E], down[: layer.E]], [made]),
            lambda: torch.matmul(x, first, out=both),
            (plugin("GatedAct", act), [both], [middle]),
            # An engine adds it in the launch that norms the sum.
            lambda: torch.addmm(*rows, second, out=total.flatten(0, 1)).view_as(x),
        ]

    def peers(self) -> dict[str, Peer]:
        return {}

    def bounds(self) -> dict[str, Callable[..., Call]]:
        return {"copy of the routed ones' bytes": functools.partial(copy_of_touched, self.routed)}


def cases() -> Iterator[SharedCase]:
    sizes = [*((1, t) for t in PREFILL), *((b, 1) for b in DECODE)]
    for layer in SHARED_BESIDE:
        yield from (SharedCase(ExpertCase(layer, B, T)) for B, T in sizes)
