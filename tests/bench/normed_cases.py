"""What bench_ops.py times of the plugins that sum and norm what experts make, and of those that add a bias as they
read: beside the plugins of their ops, one after another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from expert_cases import DECODE, GPT_OSS, LAYERS, PREFILL, Call, ExpertCase, Peer, copy_of_touched
from gpu_clock import Ceilings, copy_of

from llmexport.plugins.joined import BIASED, COLUMNS, JOINED, Part, columns_of
from llmexport.plugins.normed import ADDENDS, EXPERTS, GATE_COLUMN, NORM, OWN
from llmexport.plugins.spec import Attribute, all_ops

NORM_ATTRIBUTES: dict[str, Attribute] = {"epsilon": 1e-6, "weight_offset": 0.0, "round_before_weight": True}
# The experts of each plugin's models, and the column of a gate among those of a router.
JOINED_TO = {
    "NormedMoeExperts": GPT_OSS,
    "NormedSharedMoeExperts": next(x for x in LAYERS if x.family == "Llama-4-Scout"),
    "NormedGatedSharedMoeExperts": next(x for x in LAYERS if x.family == "Qwen3.5-35B-A3B"),
}
FREE = 63  # slots of a static cache that the step's tokens are written behind


def plugin(op: str, attributes: dict[str, Attribute]) -> Any:
    return SimpleNamespace(op=op, attributes=attributes)


@dataclass(frozen=True)
class NormedCase:
    """A plugin of `normed.py` in place of MoeExperts, what is added to it, and AddRmsNorm."""

    op: str
    experts: ExpertCase
    # The experts' two, those of the addends, and of a sum and a norm.
    roundings: int = 6

    @property
    def family(self) -> str:
        return self.experts.family

    @property
    def B(self) -> int:
        return self.experts.B

    @property
    def T(self) -> int:
        return self.experts.T

    @property
    def attributes(self) -> dict[str, Attribute]:
        gate = {GATE_COLUMN: self.experts.layer.E} if len(ADDENDS[self.op]) > 1 else {}
        return {**self.experts.attributes, **NORM_ATTRIBUTES, **gate}

    @property
    def bytes(self) -> int:
        """The experts', and a residual, a sum and what is added."""
        return self.experts.bytes + (2 + len(ADDENDS[self.op][:1])) * 2 * self.B * self.T * self.experts.layer.C

    def floor(self, ceilings: Ceilings) -> float:
        """Seconds below which it cannot be."""
        return max(self.bytes / ceilings.read, self.experts.flops / ceilings.gemm)

    @property
    def target(self) -> float:
        return self.experts.target

    def on(self, device: str) -> list[torch.Tensor]:
        own, layer = self.experts.on(device), self.experts.layer
        row = (self.B, self.T, layer.C)
        shapes = [row, (layer.C,), row, (self.B, self.T, layer.E + 1)][: 2 + len(ADDENDS[self.op])]
        return [*own[:OWN], *(torch.randn(s, device=device, dtype=torch.bfloat16) for s in shapes), *own[OWN:]]

    def inputs(self) -> list[torch.Tensor]:
        return self.on("cuda")

    def outputs(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.full_like(inputs[0], float("nan")) for _ in range(2)]

    def parted(self, inputs: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """MoeExperts' own inputs; and a residual, a norm's weight and what is added."""
        end = OWN + 2 + len(ADDENDS[self.op])
        return [*inputs[:OWN], *inputs[end:]], inputs[OWN:end]

    def added(self, made: torch.Tensor, addends: list[torch.Tensor]) -> torch.Tensor:
        shared, gate = [*addends, None, None][:2]
        if shared is not None and gate is not None:
            shared = gate[..., self.experts.layer.E, None].sigmoid() * shared
        return made if shared is None else made + shared

    def checked(self, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
        """What the references of the ops say, beside what was found."""
        own, (residual, weight, *addends) = self.parted(inputs)
        total = self.added(self.experts.reference(*own), addends)
        wanted = all_ops()[NORM].reference(total, residual, weight, None, **NORM_ATTRIBUTES)
        return list(zip(wanted, outputs, strict=True))

    def apart(self, inputs: list[torch.Tensor]) -> list[Call | tuple[Any, list[torch.Tensor], list[torch.Tensor]]]:
        """Calls, and what plugins are given, that give as much one after another."""
        own, (residual, weight, *addends) = self.parted(inputs)
        made, total, *results = (torch.empty_like(inputs[0]) for _ in range(4))
        steps: list[Any] = [(plugin(EXPERTS, self.experts.attributes), own, [made])]
        if addends:
            steps.append(lambda: total.copy_(self.added(made, addends)))
        norm = [total if addends else made, residual, weight]
        return [*steps, (plugin(NORM, NORM_ATTRIBUTES), norm, results)]

    def peers(self) -> dict[str, Peer]:
        return {}

    def bounds(self) -> dict[str, Callable[..., Call]]:
        return {"copy of the experts' bytes": functools.partial(copy_of_touched, self.experts)}


@dataclass(frozen=True)
class BiasedCase:
    """Heads of q, k and v behind each other in what one product made; a bias is added as they are read, and they are
    turned and written in a cache."""

    family: str
    B: int
    T: int
    H: int
    kv: int
    D: int
    op: str = f"{BIASED}{JOINED}QkNormRopeWrite"
    roundings: int = 3
    target: float = 0.0

    @property
    def parts(self) -> list[Part]:
        heads = (("q", 0, self.H), ("k", self.H, self.kv), ("v", self.H + self.kv, self.kv))
        return [Part(name, first * self.D, (count, self.D)) for name, first, count in heads]

    @property
    def own(self) -> dict[str, Attribute]:
        norm = {"epsilon": 0.0, "weight_offset": 0.0, "round_before_weight": False, "norm_first": True}
        return {"interleaved": False, **norm}

    @property
    def attributes(self) -> dict[str, Attribute]:
        return {**self.own, COLUMNS: columns_of(self.parts)}

    @property
    def bytes(self) -> int:
        """Heads that are read and written, and angles."""
        return 2 * self.B * self.T * (2 * (self.H + 2 * self.kv) * self.D + self.D)

    def floor(self, ceilings: Ceilings) -> float:
        """Seconds below which it cannot be."""
        return self.bytes / ceilings.copy

    def on(self, device: str) -> list[torch.Tensor]:
        columns, cache = self.parts[-1].end, (self.B, self.kv, FREE + self.T, self.D)
        angles = (self.B, self.T, self.D // 2)
        shapes = ((self.B, self.T, columns), (columns,), angles, angles, cache, cache)
        made = [torch.randn(s, device=device, dtype=torch.bfloat16) for s in shapes]
        return [*made, torch.full((self.B,), FREE, device=device, dtype=torch.int32)]

    def inputs(self) -> list[torch.Tensor]:
        return self.on("cuda")

    def outputs(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Memory for the heads of q and both caches."""
        query = inputs[0].new_empty(self.B, self.H, self.T, self.D)
        return [torch.full_like(x, float("nan")) for x in (query, *inputs[4:6])]

    def timed_outputs(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """As an engine binds them: the caches in their own memory."""
        return [self.outputs(inputs)[0], *inputs[4:6]]

    def heads(self, joined: torch.Tensor) -> list[torch.Tensor]:
        return [joined[..., p.first : p.end].unflatten(-1, p.sizes) for p in self.parts]

    def checked(self, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
        """What the reference says, beside what was found."""
        joined, bias, *rest = inputs
        wanted = all_ops()["QkNormRopeWrite"].reference(*self.heads(joined + bias), *rest, None, None, **self.own)
        return list(zip(wanted, outputs, strict=True))

    def apart(self, inputs: list[torch.Tensor]) -> list[Call | tuple[Any, list[torch.Tensor], list[torch.Tensor]]]:
        """An addition, and the plugin that adds none."""
        joined, bias, *rest = inputs
        total = torch.empty_like(joined)
        given = (plugin(self.op.removeprefix(BIASED), self.attributes), [total, *rest], self.timed_outputs(inputs))
        return [lambda: torch.add(joined, bias, out=total), given]

    def peers(self) -> dict[str, Peer]:
        return {}

    def bounds(self) -> dict[str, Callable[..., Call]]:
        return {"copy of the bytes": lambda *inputs: copy_of(self.bytes)}


def cases() -> Iterator[NormedCase | BiasedCase]:
    sizes = [*((1, t) for t in PREFILL), *((b, 1) for b in DECODE)]
    for op, layer in JOINED_TO.items():
        yield from (NormedCase(op, ExpertCase(layer, B, T)) for B, T in sizes)
    yield from (BiasedCase("gpt-oss-20b", B, T, 64, 8, 64) for B, T in sizes)
