"""What bench_ops.py times of the plugins that norm, multiply by a router's weights and route: beside AddRmsNorm, a
product of torch and the plugin that routes, one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from expert_cases import DECODE, PREFILL, Call, Peer
from gpu_clock import Ceilings, copy_of
from normed_cases import NORM_ATTRIBUTES, plugin

from llmexport.plugins.normed_route import GATE_WEIGHT, NORM, NORMED_ROUTES, WIDE, inputs_of, normed_routes
from llmexport.plugins.shared_route import SHARED_ROUTES, SLOTS
from llmexport.plugins.spec import Attribute


@dataclass(frozen=True)
class Model:
    """How a published model of hidden size C picks K of E experts; `corrected`: with a bias of the choice, in fp32."""

    op: str
    family: str
    C: int
    E: int
    K: int
    scoring: str
    renormalise: bool = False
    scale: float = 1.0
    corrected: bool = False
    groups: int = 1
    kept: int = 1


MODELS = (
    Model("NormedMoeRoute", "gpt-oss-20b", 2880, 32, 4, "softmax_top_k"),
    Model("NormedMoeRoute", "gpt-oss-120b", 2880, 128, 4, "softmax_top_k"),
    Model("NormedSharedMoeRoute", "Llama-4-Scout", 5120, 16, 1, "sigmoid"),
    Model("NormedGatedSharedMoeRoute", "Qwen3.5-35B-A3B", 2048, 256, 8, "softmax", renormalise=True),
    Model("NormedMoeRoute", "DeepSeek-V3", 7168, 256, 8, "sigmoid", True, 2.5, corrected=True, groups=8, kept=4),
)


@dataclass(frozen=True)
class RoutedCase:
    """T tokens in each of B rows."""

    model: Model
    B: int
    T: int
    # A sum, a norm, a product and its sum with a bias, and what is made of it.
    roundings: int = 8
    target: float = 0.0

    @property
    def op(self) -> str:
        return self.model.op

    @property
    def family(self) -> str:
        return self.model.family

    @property
    def route(self) -> dict[str, Attribute]:
        m = self.model
        said = {"top_k": m.K, "scoring": m.scoring, "renormalise": m.renormalise, "scale": m.scale}
        slots = {SLOTS: m.K + 1} if NORMED_ROUTES[m.op] in SHARED_ROUTES else {}
        return {**said, "groups": m.groups, "groups_kept": m.kept, "group_best": 2, **slots}

    @property
    def attributes(self) -> dict[str, Attribute]:
        return {**self.route, **NORM_ATTRIBUTES, WIDE: self.model.corrected}

    @property
    def bytes(self) -> int:
        """Four rows of every token, and the router's weights."""
        return 2 * self.model.C * (4 * self.B * self.T + self.model.E)

    def floor(self, ceilings: Ceilings) -> float:
        """Seconds below which it cannot be."""
        flops = 2 * self.B * self.T * self.model.C * self.model.E
        return max(self.bytes / ceilings.copy, flops / ceilings.gemm)

    def on(self, device: str) -> list[torch.Tensor]:
        C, E = self.model.C, self.model.E
        row = (self.B, self.T, C)
        shapes = [row, row, (C,), (E, C), (E,), *([(1, C)] if GATE_WEIGHT in inputs_of(self.op) else [])]
        made = [torch.randn(s, device=device, dtype=torch.bfloat16) for s in shapes]
        made[3] *= 3 / C**0.5
        return [*made, *([torch.randn(E, device=device)] if self.model.corrected else [])]

    def inputs(self) -> list[torch.Tensor]:
        return self.on("cuda")

    def outputs(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        rows = [torch.full_like(inputs[0], float("nan")) for _ in range(2)]
        slots = int(self.route.get(SLOTS, self.model.K))
        weights = inputs[0].new_full((self.B, self.T, slots), float("nan"))
        return [*rows, weights, torch.full_like(weights, -1, dtype=torch.int32)]

    def checked(self, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
        """What the reference says, beside what was found; of experts how likely they are: two may be as likely."""
        wanted = normed_routes()[self.op].reference(*self.named(inputs), **self.attributes)
        logits = wanted[0].float() @ inputs[3].float().T
        likely = [logits.gather(-1, o[3][..., : self.model.K].long().clamp(0)) for o in (wanted, outputs)]
        return [*zip(wanted[:3], outputs[:3], strict=True), tuple(x.sort(-1).values.bfloat16() for x in likely)]

    def named(self, inputs: list[torch.Tensor]) -> list[torch.Tensor | None]:
        """With nothing in the place of a gate's weight, if there is none."""
        own = inputs if GATE_WEIGHT in inputs_of(self.op) else [*inputs[:5], None, *inputs[5:]]
        return [*own, *[None] * (7 - len(own))]

    def apart(self, inputs: list[torch.Tensor]) -> list[Call | tuple[Any, list[torch.Tensor], list[torch.Tensor]]]:
        """What plugins are given, and calls, that give as much one after another."""
        x, residual, norm, router, bias, *rest = inputs
        gate = [rest.pop(0)] if GATE_WEIGHT in inputs_of(self.op) else []
        made = self.outputs(inputs)
        kind = torch.float32 if self.model.corrected else x.dtype
        # An engine multiplies by both at once, and a router of fp32 in fp32.
        weights, biases = torch.cat((router, *gate)).to(kind), torch.cat((bias, *(bias.new_zeros(1) for _ in gate)))
        logits = x.new_empty(self.B * self.T, weights.shape[0], dtype=kind)
        given = [part.contiguous() for part in logits.view(self.B, self.T, -1).split(self.model.E, -1)]
        chosen = x.new_empty(made[2].shape, dtype=kind)

        def multiply() -> None:
            torch.addmm(biases.to(kind), made[0].flatten(0, 1).to(kind), weights.T, out=logits)
            for to, part in zip(given, logits.view(self.B, self.T, -1).split(self.model.E, -1), strict=True):
                to.copy_(part)

        return [
            (plugin(NORM, NORM_ATTRIBUTES), [x, residual, norm], made[:2]),
            multiply,
            (plugin(NORMED_ROUTES[self.op], self.route), [*given, *(t.to(kind) for t in rest)], [chosen, made[3]]),
        ]

    def peers(self) -> dict[str, Peer]:
        return {}

    def bounds(self) -> dict[str, Callable[..., Call]]:
        return {"copy of the bytes": lambda *inputs: copy_of(self.bytes)}


def cases() -> Iterator[RoutedCase]:
    sizes = [*((1, t) for t in PREFILL), *((b, 1) for b in DECODE)]
    for model in MODELS:
        yield from (RoutedCase(model, B, T) for B, T in sizes)
