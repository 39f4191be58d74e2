"""What bench_ops.py times of Wkv: prefill and decode of a real model."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from gpu_clock import Ceilings, copy_of

from llmexport.plugins.spec import Attribute
from llmexport.plugins.wkv import wkv
from llmexport.validate.tolerance import Tolerance

Peer = Callable[..., object]
# The reference goes token by token, so that a prompt is short.
PREFILL, DECODE = (1, 1024), ((1, 1), (8, 1), (64, 1))
# Of a state in fp32: exponents of up to 20 are rounded at each token.
STATES = Tolerance(2.0**-14, 2.0**-15, scaled=True)


@dataclass(frozen=True)
class WkvCase:
    """T tokens of each of B rows, after a state."""

    family: str
    C: int
    B: int
    T: int
    op: str = "Wkv"
    roundings: int = 1  # of y

    @property
    def attributes(self) -> dict[str, Attribute]:
        return {}

    @property
    def bytes(self) -> int:
        """Read and written once each: key, value, y and presence in bf16, states in fp32."""
        return self.B * (self.T * 2 * (3 * self.C + 1) + 2 * 3 * 4 * self.C) + 2 * 4 * self.C

    def floor(self, ceilings: Ceilings) -> float:
        """Seconds below which it cannot be."""
        return self.bytes / ceilings.copy

    @property
    def target(self) -> float:
        """None was set: the tokens of a channel wait for each other."""
        return 0.0

    @property
    def fp32_tolerance(self) -> Tolerance:
        return STATES

    def inputs(self) -> list[torch.Tensor]:
        return self.on("cuda")

    def on(self, device: str) -> list[torch.Tensor]:
        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device)

        tokens, states = (self.B, self.T, self.C), (self.B, self.C)
        key, value, present = randn(*tokens), randn(*tokens), torch.ones(tokens[:2], device=device)
        sums = [randn(*states), 1 + randn(*states).abs(), randn(*states)]
        return [*(x.bfloat16() for x in (key, value, present)), randn(self.C), randn(self.C), *sums]

    def results(self) -> list[torch.Tensor]:
        """The outputs' shapes and types, without values."""
        return list(wkv(*self.on("meta")))

    def outputs(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.full_like(inputs[i], float("nan")) for i in (0, 5, 6, 7)]

    def reference(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return wkv.reference(*inputs)

    def checked(self, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
        return list(zip(self.reference(*inputs), outputs, strict=True))

    def peers(self) -> dict[str, Peer]:
        """Others that compute the same, by name; each takes the case's inputs."""
        return {"transformers": theirs} if importlib.util.find_spec("transformers") else {}

    def bounds(self) -> dict[str, Callable[..., Callable[[], object]]]:
        """What cannot be beaten, by name; each makes a call for a set of inputs."""
        return {"copy of the bytes": lambda *inputs: copy_of(self.bytes)}


def cases() -> Iterator[WkvCase]:
    for B, T in (PREFILL, *DECODE):
        yield WkvCase("RWKV-4-7B", 4096, B, T)


def theirs(key: torch.Tensor, value: torch.Tensor, present: torch.Tensor, *others: torch.Tensor) -> object:
    """RWKV of transformers without its kernel."""
    from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

    decay, first, *states = others
    return rwkv_linear_attention_cpu(decay, first, key, value, states, True)
