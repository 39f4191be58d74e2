"""What bench_ops.py times of GatedDeltaRule: prefill and decode of a real model, and who else can do the same."""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from gpu_clock import Ceilings, copy_of, once

from llmexport.plugins.gated_delta_rule import gated_delta_rule
from llmexport.plugins.spec import Attribute
from llmexport.validate.tolerance import Tolerance

Peer = Callable[..., object]
PREFILL, DECODE, CHUNK = (4096, 4 * 4096), (1, 8, 64), 64
# Fractions of the floor to reach. Prefill: 0.175 ms of 0.030 at 1x4096, as FlashQLA on an H200: the chunks wait for
# each other. Decode: by the bytes of its states, of one batch row 3 us.
PREFILL_TARGET = 0.174
DECODE_TARGETS = {1: 0.33, 8: 0.75, 64: 0.88}
# Of the state, which is fp32: twice what its kernel's test allows (2**-15 in chunks, whose products leave out 2**-17 of
# a factor, and 8 units token by token), as the reference is fp32 here too.
IN_CHUNKS = Tolerance(2.0**-14, 2.0**-15, scaled=True)
BY_TOKEN = Tolerance(16 * 2.0**-23, 8 * 2.0**-23, scaled=True)


@dataclass(frozen=True)
class Layer:
    """A published model's linear attention: heads of q and k, of v, sizes of either."""

    family: str
    G: int
    H: int
    D: int
    V: int


LAYERS = (Layer("Qwen3.5-35B-A3B", 16, 32, 128, 128),)


@dataclass(frozen=True)
class DeltaRuleCase:
    """T tokens of each of B rows, after a state."""

    layer: Layer
    B: int
    T: int
    op: str = "GatedDeltaRule"
    chunk: int = CHUNK
    roundings: int = 1  # of y

    @property
    def family(self) -> str:
        return self.layer.family

    @property
    def attributes(self) -> dict[str, Attribute]:
        return {"scale": self.layer.D**-0.5, "l2_norm": True}

    @property
    def bytes(self) -> int:
        """Read and written once each: q, k, v, y and beta in bf16, g and both states in fp32."""
        layer = self.layer
        of_token = 2 * (2 * layer.G * layer.D + 2 * layer.H * layer.V + layer.H) + 4 * layer.H
        return self.B * (self.T * of_token + 2 * 4 * layer.H * layer.D * layer.V)

    @property
    def flops(self) -> int:
        """Of the chunked form, each product once: five of C x C, three with the state, the inverse."""
        layer, C = self.layer, self.chunk
        of_chunk = 2 * C * C * (3 * layer.D + 2 * layer.V) + 3 * 2 * C * layer.D * layer.V + 2 * C**3 // 3
        return self.B * layer.H * -(-self.T // C) * of_chunk if self.T > 1 else 0

    def floor(self, ceilings: Ceilings) -> float:
        """Seconds below which it cannot be."""
        return max(self.bytes / ceilings.copy, self.flops / ceilings.gemm)

    @property
    def target(self) -> float:
        """The fraction of the floor to reach."""
        return PREFILL_TARGET if self.T > 1 else DECODE_TARGETS[self.B]

    @property
    def fp32_tolerance(self) -> Tolerance:
        return IN_CHUNKS if self.T > 1 else BY_TOKEN

    def inputs(self) -> list[torch.Tensor]:
        return self.on("cuda")

    def on(self, device: str) -> list[torch.Tensor]:
        layer, random = self.layer, functools.partial(torch.randn, device=device)
        keys, values = (self.B, self.T, layer.G, layer.D), (self.B, self.T, layer.H, layer.V)
        q, k, v = (random(s, dtype=torch.bfloat16) for s in (keys, keys, values))
        g, beta = -F.softplus(random(values[:3])), random(values[:3]).sigmoid().bfloat16()
        return [q, k, v, g, beta, random(self.B, layer.H, layer.D, layer.V)]

    def outputs(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.full_like(inputs[i], float("nan")) for i in (2, 5)]

    def reference(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gated_delta_rule.reference(*inputs, **self.attributes)

    def checked(self, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
        return list(zip(self.reference(*inputs), outputs, strict=True))

    def peers(self) -> dict[str, Peer]:
        """Others that compute the same, by name; each takes the case's inputs."""
        found = {"transformers": torch_rule(self)}
        if importlib.util.find_spec("fla"):
            found["fla"] = fla_rule(self)
        if importlib.util.find_spec("flashinfer"):
            found["flashinfer"] = flashinfer_chunks(self) if self.T > 1 else flashinfer_token(self)
        return found

    def bounds(self) -> dict[str, Callable[..., Callable[[], object]]]:
        """What cannot be beaten, by name; each makes a call for a set of inputs."""
        return {"copy of the bytes": lambda *inputs: copy_of(self.bytes)}


def cases() -> Iterator[DeltaRuleCase]:
    for layer in LAYERS:
        yield from (DeltaRuleCase(layer, 1, tokens) for tokens in PREFILL)
        yield from (DeltaRuleCase(layer, batch, 1) for batch in DECODE)


def torch_rule(case: DeltaRuleCase) -> Peer:
    """What Qwen3.5 in transformers falls back to without fla."""
    from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as model

    rule: Any = model.torch_chunk_gated_delta_rule if case.T > 1 else model.torch_recurrent_gated_delta_rule
    # Unwrapped, as with fla installed it would be fla.
    return called(inspect.unwrap(rule))


def fla_rule(case: DeltaRuleCase) -> Peer:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

    return called(chunk_gated_delta_rule if case.T > 1 else fused_recurrent_gated_delta_rule)


def called(rule: Callable[..., Any]) -> Peer:
    """By the arguments that both have; their scale is ours."""
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    return lambda q, k, v, g, beta, state: rule(q, k, v, g=g, beta=beta, initial_state=state, **options)


def flashinfer_chunks(case: DeltaRuleCase) -> Peer:
    """Takes the tokens of all rows in one dimension, decays rather than their logs, and states as [V, D]."""

    @once
    def arguments(*inputs: torch.Tensor) -> dict[str, Any]:
        q, k, v, g, beta, state = inputs
        packed = {"q": q, "k": k, "v": v, "g": g.exp(), "beta": beta.float(), "output": torch.empty_like(v)}
        turned = state.transpose(2, 3).contiguous()
        return {
            **{name: x.flatten(0, 1) for name, x in packed.items()},
            "initial_state": turned,
            "output_state": torch.empty_like(turned),
            "cu_seqlens": case.T * torch.arange(case.B + 1, device=q.device),
            "scale": case.layer.D**-0.5,
            "output_final_state": True,
            "use_qk_l2norm_in_kernel": True,
        }

    def rule(*inputs: torch.Tensor) -> object:
        from flashinfer.gdn_prefill import chunk_gated_delta_rule

        return chunk_gated_delta_rule(**arguments(*inputs))

    return rule


def flashinfer_token(case: DeltaRuleCase) -> Peer:
    """Takes what the gates are made of, g = -exp(A_log) softplus(a + dt_bias) and beta = sigmoid(b), and moves the
    state in place.
    """

    @once
    def arguments(*inputs: torch.Tensor) -> dict[str, Any]:
        q, k, v, g, beta, state = inputs
        nothing = torch.zeros(case.layer.H, device=q.device)
        a, b = torch.log(torch.expm1(-g)), torch.logit(beta.float())
        return {
            "q": q,
            "k": k,
            "v": v,
            "state": state.clone(),
            "A_log": nothing,
            "a": a.to(q.dtype),
            "dt_bias": nothing,
            "b": b.to(q.dtype),
            "scale": case.layer.D**-0.5,
            "use_qk_l2norm": True,
        }

    def rule(*inputs: torch.Tensor) -> object:
        from flashinfer.gdn_decode import gated_delta_rule_decode

        return gated_delta_rule_decode(**arguments(*inputs))

    return rule
