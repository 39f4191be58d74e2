"""What bench_ops.py times of SinkAttention: prefill and decode of real models, and who else can do the same."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from gpu_clock import Ceilings

from llmexport.plugins.sink_attention import sink_attention
from llmexport.plugins.spec import Attribute

Peer = Callable[..., object]
BF16_BYTES = 2
PREFILL, DECODE, CONTEXT = (4096, 4 * 4096), (1, 8, 64), 8192
# Fractions of the floor to reach. Prefill: what mma.sync reaches of the GEMM ceiling, and twice the time of the
# bytes where these are more. Decode: by its bytes, the least of which are hardly more than a launch.
GEMM_TARGET, BYTES_TARGET = 0.35, 0.5
DECODE_TARGETS = ((256 << 20, 0.88), (64 << 20, 0.75), (8 << 20, 0.4), (0, 0.0))
OPERATIONS_PER_BYTE = 180  # of an H200
CHECKED = 64  # first and last queries whose numbers are compared: all logits would not fit the memory
WORKSPACE_BYTES = 256 << 20


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

    def inputs(self) -> list[torch.Tensor]:
        layer = self.layer
        shapes = [(self.B, layer.H, self.T, layer.D), *[(self.B, layer.G, self.S, layer.D)] * 2]
        made = [torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in shapes]
        made.append(torch.zeros(self.B, device="cuda", dtype=torch.int32))
        made.append(torch.full((self.B,), self.S, device="cuda", dtype=torch.int32))
        return made + [torch.randn(layer.H, device="cuda", dtype=torch.bfloat16)] * layer.sinks

    def outputs(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.full_like(inputs[0], float("nan"))]

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
        return [(last, outputs[0][:, :, -count:]), (first, outputs[0][:, :, :count])]

    def peers(self) -> dict[str, Peer]:
        """Others that compute the same, by name; each takes the case's inputs."""
        torch._dynamo.reset()
        found: dict[str, Peer] = {"flex_attention": flex(self)}
        if not self.layer.softcap:
            found["torch flash"] = flash(self)
            if not self.layer.window and not self.layer.sinks:
                found["torch SDPA"] = sdpa(self)
        if importlib.util.find_spec("flashinfer"):
            found["flashinfer"] = flashinfer_prefill(self) if self.T > 1 else flashinfer_decode(self)
        return found


def cases() -> Iterator[AttentionCase]:
    for layer in LAYERS:
        for tokens in PREFILL:
            yield AttentionCase(layer, 1, tokens, tokens)
        for batch in DECODE:
            yield AttentionCase(layer, batch, 1, CONTEXT)


def with_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Attention with sinks from attention without and the log of its weights' sum, as transformers makes it.

    out [..., H, T, D], lse [..., H, T], sinks [H].
    """
    return (out.float() * torch.sigmoid(lse - sinks.float()[:, None]).unsqueeze(-1)).to(out.dtype)


def flex(case: AttentionCase) -> Peer:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    layer, past = case.layer, case.S - case.T

    def visible(b: object, h: object, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        seen = key <= query + past
        return seen & (key > query + past - layer.window) if layer.window else seen

    def capped(score: torch.Tensor, *place: object) -> torch.Tensor:
        return layer.softcap * torch.tanh(score / layer.softcap)

    @functools.cache
    def mask(device: torch.device) -> object:
        return create_block_mask(visible, None, None, case.T, case.S, device)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: object, *sinks: torch.Tensor) -> torch.Tensor:
        score = capped if layer.softcap else None
        call = functools.partial(flex_attention, q, k, v, score, mask, enable_gqa=layer.G < layer.H)
        return with_sinks(*call(return_lse=True), sinks[0]) if sinks else call()

    compiled = torch.compile(attend, dynamic=False)
    return lambda q, k, v, start, length, *sinks: compiled(q, k, v, mask(q.device), *sinks)


def flash(case: AttentionCase) -> Peer:
    """FlashAttention-2 as torch has it, which takes [B, T, H, D]: views of ours, whose strides it accepts."""
    window = case.layer.window

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: object, length: object, *sinks: torch.Tensor
    ) -> torch.Tensor:
        views = (x.transpose(1, 2) for x in (q, k, v))
        sides = {"window_size_left": window - 1, "window_size_right": 0} if window else {}
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *views, None, None, case.T, case.S, 0.0, case.T > 1, False, scale=case.layer.D**-0.5, **sides
        )
        out = out.transpose(1, 2)
        return with_sinks(out, lse, sinks[0]) if sinks else out

    return attend


def sdpa(case: AttentionCase) -> Peer:
    """Whatever torch thinks best."""
    return lambda q, k, v, *rest: F.scaled_dot_product_attention(q, k, v, is_causal=case.T > 1, enable_gqa=True)


def flashinfer_prefill(case: AttentionCase) -> Peer:
    import flashinfer

    layer = case.layer
    call = functools.partial(
        flashinfer.single_prefill_with_kv_cache,
        causal=True,
        kv_layout="HND",
        window_left=layer.window - 1,
        logits_soft_cap=layer.softcap or None,
        return_lse=layer.sinks,
    )
    turned: dict[int, torch.Tensor] = {}

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: torch.Tensor) -> object:
        # It takes queries as [T, H, D]; turned once, outside the timed graph.
        if q.data_ptr() not in turned:
            turned[q.data_ptr()] = q[0].transpose(0, 1).contiguous()
        found = call(turned[q.data_ptr()], k[0], v[0])
        if not layer.sinks:
            return found.transpose(0, 1)[None]
        out, log2 = found
        return with_sinks(out.transpose(0, 1), log2.transpose(0, 1) * math.log(2), rest[-1])[None]

    return attend


def flashinfer_decode(case: AttentionCase) -> Peer:
    """The cache of a row is one page."""
    import flashinfer

    layer = case.layer

    @functools.cache
    def wrapper() -> Any:
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
        made = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
        rows = torch.arange(case.B + 1, dtype=torch.int32, device="cuda")
        made.plan(
            rows,
            rows[:-1],
            torch.full((case.B,), case.S, dtype=torch.int32, device="cuda"),
            layer.H,
            layer.G,
            layer.D,
            case.S,
            window_left=layer.window - 1,
            logits_soft_cap=layer.softcap or None,
            q_data_type=torch.bfloat16,
            kv_data_type=torch.bfloat16,
        )
        return made

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: torch.Tensor) -> object:
        found = wrapper().run(q[:, :, 0], (k, v), return_lse=layer.sinks)
        if not layer.sinks:
            return found[:, :, None]
        out, log2 = found
        return with_sinks(out[:, :, None], log2[:, :, None] * math.log(2), rest[-1])

    return attend
