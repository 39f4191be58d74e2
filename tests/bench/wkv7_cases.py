"""What bench_ops.py times of Wkv7: prefill and decode of a real model, and who else can do the same."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from gpu_clock import Ceilings, copy_of

from llmexport.plugins.spec import Attribute
from llmexport.plugins.wkv7 import wkv7
from llmexport.plugins.wkv7.body import RATE
from llmexport.validate.tolerance import Tolerance

Peer = Callable[..., object]
# The reference goes token by token, so that a prompt is short.
PREFILL, DECODE = (1, 1024), ((1, 1), (8, 1), (64, 1))
# Of a state in fp32, beside a reference in fp32: sums of as many products as a head has numbers.
STATES = Tolerance(2.0**-14, 2.0**-15, scaled=True)


@dataclass(frozen=True)
class Wkv7Case:
    """T tokens of each of B rows, after a state; heads of D numbers."""

    family: str
    H: int
    D: int
    B: int
    T: int
    op: str = "Wkv7"
    roundings: int = 1  # of y

    @property
    def attributes(self) -> dict[str, Attribute]:
        return {}

    @property
    def bytes(self) -> int:
        """Read and written once each: seven of [H, D] and presence in bf16 for a token, states in fp32."""
        return self.B * (self.T * 2 * (7 * self.H * self.D + 1) + 2 * 4 * self.H * self.D**2)

    def floor(self, ceilings: Ceilings) -> float:
        """Seconds below which it cannot be."""
        return self.bytes / ceilings.copy

    @property
    def target(self) -> float:
        """None was set: the tokens of a head wait for each other."""
        return 0.0

    @property
    def fp32_tolerance(self) -> Tolerance:
        return STATES

    def inputs(self) -> list[torch.Tensor]:
        return self.on("cuda")

    def on(self, device: str) -> list[torch.Tensor]:
        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device)

        shape = (self.B, self.T, self.H, self.D)
        r, w, k, v = randn(*shape), randn(*shape), randn(*shape) / self.D**0.5, randn(*shape)
        kappa, a, present = F.normalize(randn(*shape), dim=-1), randn(*shape).sigmoid(), torch.ones(shape[:2])
        tensors = [x.to(device, torch.bfloat16) for x in (r, w, k, v, kappa, a, present)]
        return [*tensors, randn(self.B, self.H, self.D, self.D)]

    def results(self) -> list[torch.Tensor]:
        """The outputs' shapes and types, without values."""
        return list(wkv7(*self.on("meta")))

    def outputs(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.full_like(inputs[i], float("nan")) for i in (3, 7)]

    def reference(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return wkv7.reference(*inputs)

    def checked(self, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
        return list(zip(self.reference(*inputs), outputs, strict=True))

    def peers(self) -> dict[str, Peer]:
        """Others that compute the same, by name; each takes the case's inputs."""
        return {"fla": theirs} if importlib.util.find_spec("fla") else {}

    def bounds(self) -> dict[str, Callable[..., Callable[[], object]]]:
        """What cannot be beaten, by name; each makes a call for a set of inputs."""
        return {"copy of the bytes": lambda *inputs: copy_of(self.bytes)}


def cases() -> Iterator[Wkv7Case]:
    for B, T in (PREFILL, *DECODE):
        yield Wkv7Case("RWKV7-Goose-World3-1.5B", 32, 64, B, T)


def theirs(*inputs: torch.Tensor) -> object:
    """fla's kernels, which take the log of decays, and a state of keys by values."""
    from fla.ops.rwkv7 import chunk_rwkv7, fused_mul_recurrent_rwkv7

    r, w, k, v, kappa, a, _, state = inputs
    decay, known = RATE * w.sigmoid(), {"initial_state": state.mT, "output_final_state": True, "scale": 1.0}
    if r.shape[1] == 1:
        return fused_mul_recurrent_rwkv7(r, decay, k, v, kappa, a, **known)
    return chunk_rwkv7(r, decay, k, v, -kappa, kappa * a, **known)
