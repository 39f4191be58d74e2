"""What bench_ops.py times of SinkAttention: prefill and decode of real models."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import attention_peers
import torch
from gpu_clock import Ceilings, copy_of

from llmexport.plugins.sink_attention import sink_attention
from llmexport.plugins.spec import Attribute

BF16_BYTES = 2
PREFILL, DECODE, CONTEXT = (4096, 4 * 4096), (1, 8, 64), 8192
# Fractions of the floor to reach. Prefill: what mma.sync reaches of the GEMM ceiling, and twice the time of the
# bytes where these are more. Decode: by its bytes, the least of which are hardly more than a launch.
GEMM_TARGET, BYTES_TARGET = 0.35, 0.5
DECODE_TARGETS = ((256 << 20, 0.88), (64 << 20, 0.75), (8 << 20, 0.4), (0, 0.0))
OPERATIONS_PER_BYTE = 180  # of an H200
CHECKED = 64  # first and last queries whose numbers are compared: all logits would not fit the memory


@dataclass(frozen=True)
class Layer:
    """A published model's attention: heads, kv heads, head size, window, soft cap, sinks."""

    family: str
    H: int
    G: int
    D: int
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False


LAYERS = (
    Layer("gpt-oss-20b full", 64, 8, 64, sinks=True),
    Layer("gpt-oss-20b window", 64, 8, 64, window=128, sinks=True),
    Layer("Llama-3.1-8B", 32, 8, 128),
    Layer("GLM-4-9B", 32, 2, 128),
    Layer("Gemma-2B", 8, 1, 256),
    Layer("Gemma-2-9B window", 16, 8, 256, window=4096, softcap=50.0),
)


@dataclass(frozen=True)
class AttentionCase:
    """T queries of each of B rows, the last of S keys."""

    layer: Layer
    B: int
    T: int
    S: int
    op: str = "SinkAttention"
    roundings: int = 1

    @property
    def family(self) -> str:
        return self.layer.family

    @property
    def attributes(self) -> dict[str, Attribute]:
        return {"scale": self.layer.D**-0.5, "softcap": self.layer.softcap, "window": self.layer.window}

    @property
    def pairs(self) -> int:
        """Queries times the keys that they see, of one head."""
        window = self.layer.window or self.S
        return sum(min(window, self.S - self.T + i + 1) for i in range(self.T))

    @property
    def bytes(self) -> int:
        """Queries, results, and the keys and values that any query sees."""
        layer, keys = self.layer, self.S
        if layer.window:
            keys = min(keys, self.T + layer.window - 1)
        return BF16_BYTES * self.B * layer.D * (2 * layer.H * self.T + 2 * layer.G * keys)

    @property
    def flops(self) -> int:
        return 4 * self.B * self.layer.H * self.layer.D * self.pairs

    def floor(self, ceilings: Ceilings) -> float:
        """Seconds below which it cannot be; decode reads and writes next to nothing."""
        return max(self.bytes / ceilings.read, self.flops / ceilings.gemm)

    @property
    def target(self) -> float:
        """The fraction of the floor to reach; 0 where launching is most of the time."""
        if self.T > 1:
            return GEMM_TARGET if self.flops > OPERATIONS_PER_BYTE * self.bytes else BYTES_TARGET
        return next(target for least, target in DECODE_TARGETS if self.bytes >= least)

    def on(self, device: str) -> list[torch.Tensor]:
        layer = self.layer
        shapes = [(self.B, layer.H, self.T, layer.D), *[(self.B, layer.G, self.S, layer.D)] * 2]
        made = [torch.randn(s, device=device, dtype=torch.bfloat16) for s in shapes]
        made.append(torch.zeros(self.B, device=device, dtype=torch.int32))
        made.append(torch.full((self.B,), self.S, device=device, dtype=torch.int32))
        return made + [torch.randn(layer.H, device=device, dtype=torch.bfloat16)] * layer.sinks

    def inputs(self) -> list[torch.Tensor]:
        return self.on("cuda")

    def outputs(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [inputs[0].new_full((self.B, self.T, self.layer.H, self.layer.D), float("nan"))]

    def reference(self, *inputs: torch.Tensor) -> torch.Tensor:
        return sink_attention.reference(*inputs, *[None] * (6 - len(inputs)), **self.attributes)

    def checked(self, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
        """What the reference says of some queries, and what was found."""
        q, k, v, start, length, *sinks = inputs
        count = min(CHECKED, self.T)
        last = self.reference(q[:, :, -count:], k, v, start, length, *sinks)
        # To its first queries the prompt ends there.
        seen = self.S - self.T + count
        first = self.reference(q[:, :, :count], k[:, :, :seen], v[:, :, :seen], start, length * 0 + seen, *sinks)
        return [(last, outputs[0][:, -count:]), (first, outputs[0][:, :count])]

    def peers(self) -> dict[str, Callable[..., object]]:
        """Others that compute the same, by name; each takes the case's inputs."""
        torch._dynamo.reset()
        found = {"flex_attention": attention_peers.flex(self)}
        if not self.layer.softcap:
            found["torch flash"] = attention_peers.flash(self)
            if not self.layer.window and not self.layer.sinks:
                found["torch SDPA"] = attention_peers.sdpa(self)
        if importlib.util.find_spec("flashinfer"):
            one = attention_peers.flashinfer_prefill if self.T > 1 else attention_peers.flashinfer_decode
            found["flashinfer"] = one(self)
            if self.layer.sinks:
                found["flashinfer sinks"] = attention_peers.flashinfer_sinks(self)
        # Of a single query cuDNN takes no sinks.
        if self.layer.sinks and self.T > 1 and importlib.util.find_spec("cudnn"):
            found["cuDNN sinks"] = attention_peers.cudnn_sinks(self)
        return found

    def bounds(self) -> dict[str, Callable[..., Callable[[], object]]]:
        """What cannot be beaten, by name; each makes a call for a set of inputs."""
        return {"copy of the bytes": lambda *inputs: copy_of(self.bytes)}


def cases() -> Iterator[AttentionCase]:
    for layer in LAYERS:
        for tokens in PREFILL:
            yield AttentionCase(layer, 1, tokens, tokens)
        for batch in DECODE:
            yield AttentionCase(layer, batch, 1, CONTEXT)
