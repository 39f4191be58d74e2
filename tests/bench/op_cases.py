"""What bench_ops.py times: each op at the shapes of real models, and who else can do the same."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import attention_cases
import delta_rule_cases
import torch
import torch.nn.functional as F
from gpu_clock import Ceilings

from llmexport.plugins.spec import Attribute, all_ops

PREFILL = (4096, 4 * 4096)
DECODE = (1, 8, 64)
# Fractions of the floor at T = 4096 and 16384 (issue 3).
PREFILL_TARGETS = dict(zip(PREFILL, (0.85, 0.92), strict=True))
Peer = Callable[..., object]


@dataclass(frozen=True)
class Family:
    """A published model: hidden size, heads, kv heads, head size, rotated pairs, intermediate size."""

    name: str
    C: int
    H: int
    kv: int
    D: int
    R: int
    I: int  # noqa: E741
    activation: str = "silu"
    weight_offset: float = 0.0
    interleaved: bool = False


FAMILIES = (
    Family("Gemma-2B", 2048, 8, 1, 256, 128, 16384, "gelu_tanh", 1.0),
    Family("Llama-3.1-8B", 4096, 32, 8, 128, 64, 14336),
    Family("Mistral-7B-v0.1", 4096, 32, 8, 128, 64, 14336),
    Family("Qwen2-7B", 3584, 28, 4, 128, 64, 18944),
    Family("GLM-4-9B", 4096, 32, 2, 128, 32, 13696, interleaved=True),
)


@dataclass(frozen=True)
class Case:
    op: str
    family: str
    B: int
    T: int
    shapes: tuple[tuple[int, ...], ...]
    attributes: dict[str, Attribute]

    @property
    def bytes(self) -> int:
        """Read and written once each, in bf16."""
        elements = [torch.Size(s).numel() for s in (*self.shapes, *self.shapes[: self.outputs_count])]
        return 2 * sum(elements)

    @property
    def outputs_count(self) -> int:
        return len(all_ops()[self.op].outputs)

    def floor(self, ceilings: Ceilings) -> float:
        """Seconds below which it cannot be, by what the GPU does at most."""
        return self.bytes / ceilings.copy

    @property
    def target(self) -> float:
        """The fraction of the floor to reach; 0 where launching is most of the time."""
        return PREFILL_TARGETS.get(self.T, 0.0)

    def inputs(self) -> list[torch.Tensor]:
        return [torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in self.shapes]

    def outputs(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Memory for the results, of the first input's shape."""
        return [torch.full_like(inputs[0], float("nan")) for _ in range(self.outputs_count)]

    def checked(self, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
        """What the reference says, beside what was found."""
        wanted = self.reference(*inputs)
        return list(zip(wanted if isinstance(wanted, tuple) else (wanted,), outputs, strict=True))

    @property
    def reference(self) -> Callable[..., Any]:
        """The op's torch reference with these attributes."""
        function, attributes = all_ops()[self.op].reference, self.attributes
        return lambda *inputs: function(*inputs, **attributes)

    def peers(self) -> dict[str, Peer]:
        """Others that compute the same, by name; each takes the case's inputs."""
        # It compiles one function for a few shapes only, then quietly no more.
        torch._dynamo.reset()
        compiled = torch.compile(self.reference, mode="max-autotune-no-cudagraphs", dynamic=False)
        found: dict[str, Peer] = {"torch eager": eager(self), "torch.compile": compiled}
        if importlib.util.find_spec("flashinfer"):
            found |= flashinfer_peers(self)
        if importlib.util.find_spec("fla"):
            found |= fla_peers(self)
        return found


def cases() -> Iterator[Case | attention_cases.AttentionCase | delta_rule_cases.DeltaRuleCase]:
    """Every op of every family, each shape once."""
    yield from attention_cases.cases()
    yield from delta_rule_cases.cases()
    seen: set[tuple[Any, ...]] = set()
    for family in FAMILIES:
        for B, T in [*((1, t) for t in PREFILL), *((b, 1) for b in DECODE)]:
            for case in of_family(family, B, T):
                key = (case.op, case.shapes, tuple(case.attributes.items()))
                if key not in seen:
                    seen.add(key)
                    yield case


def of_family(f: Family, B: int, T: int) -> Iterator[Case]:
    angles = (B, T, f.R)
    rope = {"interleaved": f.interleaved}
    yield Case("Rope", f.name, B, T, ((B, f.H, T, f.D), angles, angles), rope)
    norm = {"epsilon": 1e-6, "weight_offset": f.weight_offset, "round_before_weight": f.weight_offset == 0}
    yield Case("AddRmsNorm", f.name, B, T, ((B, T, f.C), (B, T, f.C), (f.C,)), norm)
    act = {"activation": f.activation, "alpha": 0.0, "limit": 0.0}
    yield Case("GatedAct", f.name, B, T, ((B, T, f.I), (B, T, f.I)), act)


def eager(case: Case) -> Peer:
    """The fewest calls that torch has for it."""
    if case.op == "GatedAct":
        approximate = "tanh" if case.attributes["activation"] == "gelu_tanh" else "none"
        if case.attributes["activation"] == "silu":
            return lambda gate, up: F.silu(gate) * up
        return lambda gate, up: F.gelu(gate, approximate=approximate) * up
    if case.op == "AddRmsNorm" and not case.attributes["weight_offset"]:
        return lambda x, residual, weight: F.rms_norm(x + residual, weight.shape, weight, 1e-6)
    return case.reference


def flashinfer_peers(case: Case) -> dict[str, Peer]:
    """flashinfer gates the halves of one tensor and adds in place; bytes moved are the same."""
    import flashinfer

    if case.op == "GatedAct":
        acts = {"silu": flashinfer.silu_and_mul, "gelu_tanh": flashinfer.gelu_tanh_and_mul}
        act = acts[str(case.attributes["activation"])]
        joined: dict[int, torch.Tensor] = {}

        def gated(gate: torch.Tensor, up: torch.Tensor) -> object:
            # Joined once, outside the timed graph.
            if gate.data_ptr() not in joined:
                joined[gate.data_ptr()] = torch.cat((gate, up), -1).flatten(0, 1)
            return act(joined[gate.data_ptr()])

        return {"flashinfer": gated}
    if case.op == "AddRmsNorm":
        norm = flashinfer.gemma_fused_add_rmsnorm if case.attributes["weight_offset"] else flashinfer.fused_add_rmsnorm
        return {"flashinfer": lambda x, residual, weight: norm(x.flatten(0, 1), residual.flatten(0, 1), weight, 1e-6)}
    return {}


def fla_peers(case: Case) -> dict[str, Peer]:
    from fla.modules.activations import swiglu
    from fla.modules.layernorm import rms_norm

    if case.op == "GatedAct" and case.attributes["activation"] == "silu":
        return {"fla": swiglu}
    if case.op == "AddRmsNorm" and not case.attributes["weight_offset"]:
        return {"fla": lambda x, residual, weight: rms_norm(x, weight, None, residual=residual, eps=1e-6, prenorm=True)}
    return {}
