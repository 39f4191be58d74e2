"""What bench_ops.py times of MoeExperts: prefill and decode of real models, and who else can do the same."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from gpu_clock import Ceilings, copy_of, once

from llmexport.plugins.gated_act import gated_act
from llmexport.plugins.microscaling import BLOCK
from llmexport.plugins.moe_experts import moe_experts
from llmexport.plugins.moe_experts.formats import dequantise
from llmexport.plugins.packed_formats import PACKED
from llmexport.plugins.spec import Attribute

Peer, Call = Callable[..., object], Callable[[], object]
PREFILL, DECODE = (4096, 4 * 4096), (1, 8, 64)
BF16_BYTES = 2.0
# Fractions of the floor to reach. Prefill: what mma.sync reaches of the GEMM ceiling. Decode: of the read ceiling,
# whatever the weights' type.
PREFILL_TARGET = 0.5
DECODE_TARGETS = dict(zip(DECODE, (0.7, 0.85, 0.85), strict=True))
GATHERED_BYTES = 16 << 30  # that batched_mm may copy of the weights


@dataclass(frozen=True)
class Layer:
    """A published model's experts: hidden and intermediate size, how many, how many of them a token has."""

    family: str
    C: int
    I: int  # noqa: E741
    E: int
    K: int
    activation: str = "silu"
    transposed: bool = False
    interleaved: bool = False
    scale_input: bool = False
    biases: bool = False
    format: str = "plain"
    group: int = 0

    @property
    def scales(self) -> torch.dtype:
        return torch.uint8 if PACKED[self.format].scales else torch.float32

    @property
    def weight_bytes(self) -> float:
        if self.format == "plain":
            return BF16_BYTES
        return 1 / PACKED[self.format].per_byte + self.scales.itemsize / self.group


GPT_OSS = Layer("gpt-oss-20b", 2880, 2880, 32, 4, "swiglu_clamped", transposed=True, interleaved=True, biases=True)
LAYERS = (
    Layer("Qwen3.5-35B-A3B", 2048, 512, 256, 8),
    GPT_OSS,
    replace(GPT_OSS, family="gpt-oss-20b MXFP4", transposed=False, format="mxfp4", group=BLOCK),
    Layer("Llama-4-Scout", 5120, 8192, 16, 1, transposed=True, scale_input=True),
    Layer("Qwen3.5-35B-A3B INT4", 2048, 512, 256, 8, biases=True, format="uint4", group=128),
    Layer("Qwen3.5-35B-A3B NVFP4", 2048, 512, 256, 8, biases=True, format="nvfp4", group=16),
    Layer("Qwen3.5-35B-A3B FP8", 2048, 512, 256, 8, biases=True, format="fp8", group=128),
    Layer("Mixtral-8x7B", 4096, 14336, 8, 2),
    Layer("GLM-4.5-Air", 4096, 1408, 128, 8),
)


@dataclass(frozen=True)
class ExpertCase:
    """T tokens in each of B rows, which choose their experts at random."""

    layer: Layer
    B: int
    T: int
    op: str = "MoeExperts"
    # An activation on the other side of a tie, and the result.
    roundings: int = 2

    @property
    def family(self) -> str:
        return self.layer.family

    @property
    def attributes(self) -> dict[str, Attribute]:
        flags = {n: getattr(self.layer, n) for n in ("transposed", "interleaved", "scale_input")}
        format = {"format": self.layer.format, "group": self.layer.group}
        return {"activation": self.layer.activation, "alpha": 1.702, "limit": 7.0, **flags, **format}

    @property
    def bytes(self) -> int:
        """Of as many experts as are likely to be chosen."""
        layer = self.layer
        return self.bytes_of(layer.E * (1 - (1 - layer.K / layer.E) ** (self.B * self.T)))

    def bytes_of(self, chosen: float) -> int:
        """Weights of so many experts, inputs and results."""
        layer = self.layer
        weights = 3 * chosen * layer.C * layer.I * layer.weight_bytes
        return int(weights + 2 * self.B * self.T * layer.C * BF16_BYTES)

    @property
    def flops(self) -> int:
        return 6 * self.B * self.T * self.layer.K * self.layer.C * self.layer.I

    def floor(self, ceilings: Ceilings) -> float:
        """Seconds below which it cannot be: nearly all is read."""
        return max(self.bytes / ceilings.read, self.flops / ceilings.gemm)

    @property
    def target(self) -> float:
        """The fraction of the floor to reach."""
        return PREFILL_TARGET if self.T > 1 else DECODE_TARGETS[self.B]

    def on(self, device: str) -> list[torch.Tensor]:
        layer, tokens = self.layer, (self.B, self.T)
        shapes = [(layer.E, 2 * layer.I, layer.C), (layer.E, layer.C, layer.I)]

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device, dtype=torch.bfloat16)

        def numbers(low: int, high: int, *shape: int) -> torch.Tensor:
            return torch.randint(low, high, shape, device=device, dtype=torch.uint8)

        def scales(*shape: int) -> torch.Tensor:
            """With which weights are of order 1 / sqrt(columns)."""
            if layer.scales == torch.float32:
                return torch.rand(shape, device=device).mul_(2.0 ** (-12 if layer.format == "fp8" else -7))
            return numbers(*((119, 123) if layer.format == "mxfp4" else (8, 16)), *shape)

        experts = torch.rand(*tokens, layer.E, device=device).topk(layer.K).indices.int()
        made = [normal(*tokens, layer.C), torch.rand(*tokens, layer.K, device=device).bfloat16(), experts]
        if layer.format != "plain":
            # Without a bit that NaN of E4M3 has.
            each = 0xF7 if layer.format == "fp8" else 0xFF
            made += [numbers(0, 256, e, n, k // PACKED[layer.format].per_byte) & each for e, n, k in shapes]
        else:
            matrices = [normal(e, n, k).mul_(k**-0.5) for e, n, k in shapes]
            made += [m.transpose(1, 2).contiguous() for m in matrices] if layer.transposed else matrices
        if layer.biases:
            made += [normal(e, n) for e, n, _ in shapes]
        if layer.format != "plain":
            made += [scales(e, n, -(-k // layer.group)) for e, n, k in shapes]
        return made

    def inputs(self) -> list[torch.Tensor]:
        return self.on("cuda")

    def outputs(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.full_like(inputs[0], float("nan"))]

    def reference(self, *inputs: torch.Tensor) -> torch.Tensor:
        return moe_experts.reference(*inputs, *[None] * (13 - len(inputs)), **self.attributes)

    def checked(self, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
        """What the reference says, beside what was found."""
        return [(self.reference(*inputs), outputs[0])]

    def peers(self) -> dict[str, Peer]:
        """Others that compute the same, by name; each takes the case's inputs."""
        layer = self.layer
        found = {"transformers grouped_mm": of_transformers(self, "grouped_mm")}
        if self.B * self.T * layer.K * layer.C * layer.I * 3 * BF16_BYTES <= GATHERED_BYTES:
            found["transformers batched_mm"] = of_transformers(self, "batched_mm")
        return found

    def bounds(self) -> dict[str, Callable[..., Call]]:
        """What cannot be beaten, or is a part of the work, by name; each makes a call for a set of inputs."""
        found: dict[str, Callable[..., Call]] = {"copy of the bytes": functools.partial(copy_of_touched, self)}
        if self.T > 1:
            found["one GEMM"] = functools.partial(dense_products, self)
            if hasattr(F, "grouped_mm"):
                found["F.grouped_mm alone"] = functools.partial(grouped_products, self)
        return found


def of_transformers(case: ExpertCase, name: str) -> Peer:
    """One of its experts_implementations. Packed weights are dequantised once for it, outside the timed graph."""
    from transformers.integrations import moe

    layer, forward = case.layer, getattr(moe, f"{name}_experts_forward")

    def apply_gate(both: torch.Tensor) -> torch.Tensor:
        gate, up = (both[..., 0::2], both[..., 1::2]) if layer.interleaved else both.chunk(2, -1)
        if layer.activation == "silu":
            return F.silu(gate) * up
        values = case.attributes
        return gated_act.reference(gate, up, layer.activation, float(values["alpha"]), float(values["limit"]))

    @once
    def module(*stored: torch.Tensor) -> Any:
        (gate_up, down), rest = in_bf16(layer, *stored), stored[2:]
        biases = dict(zip(("gate_up_proj_bias", "down_proj_bias"), rest, strict=False))
        return SimpleNamespace(
            num_experts=layer.E,
            gate_up_proj=gate_up,
            down_proj=down,
            is_transposed=layer.transposed,
            has_bias=layer.biases,
            has_gate=True,
            has_post_expert_norm=False,
            _is_expert_parallel=False,
            _apply_gate=apply_gate,
            **biases,
        )

    def experts(x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, 1)
        if layer.scale_input:  # of one expert a token
            rows, weights = rows * weights.flatten(0, 1), torch.ones_like(weights)
        return forward(module(*rest), rows, chosen.flatten(0, 1).long(), weights.flatten(0, 1)).view_as(x)

    return experts


def in_bf16(
    layer: Layer, gate_up: torch.Tensor, down: torch.Tensor, *rest: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights as they are stored, but for packed ones, whose `rest` is biases and scales."""
    if layer.format == "plain":
        return gate_up, down
    pairs = ((gate_up, rest[2]), (down, rest[3]))
    first, second = (dequantise(layer.format, layer.group, *m).bfloat16() for m in pairs)
    return first, second


def copy_of_touched(case: ExpertCase, *inputs: torch.Tensor) -> Call:
    """Of the experts that these tokens chose."""
    return copy_of(case.bytes_of(len(inputs[2].unique())))


def sorted_rows(case: ExpertCase, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of every token and expert, by expert: inputs of both projections, [pairs, C] and [pairs, I], and the matrices
    [E, C, 2I] and [E, I, C]; last, where each expert's rows end.
    """
    layer, (x, _, experts) = case.layer, inputs[:3]
    chosen, order = experts.flatten().sort()
    ends = torch.bincount(chosen, minlength=layer.E).cumsum(0).int()
    rows = x.flatten(0, 1)[order // layer.K]
    first, second = (m if layer.transposed else m.mT for m in in_bf16(layer, *inputs[3:]))
    return rows, rows.new_empty(len(rows), layer.I).normal_(), first, second, ends


def grouped_products(case: ExpertCase, *inputs: torch.Tensor) -> Call:
    """Both projections, without routing, biases, gate and sum."""
    rows, gated, first, second, ends = sorted_rows(case, *inputs)
    return lambda: (F.grouped_mm(rows, first, offs=ends), F.grouped_mm(gated, second, offs=ends))


def dense_products(case: ExpertCase, *inputs: torch.Tensor) -> Call:
    """As many operations, all rows by the matrices of one expert."""
    rows, gated, first, second, _ = sorted_rows(case, *inputs)
    return lambda: (rows @ first[0], gated @ second[0])


def cases() -> Iterator[ExpertCase]:
    for layer in LAYERS:
        for tokens in PREFILL:
            yield ExpertCase(layer, 1, tokens)
        for batch in DECODE:
            yield ExpertCase(layer, batch, 1)
