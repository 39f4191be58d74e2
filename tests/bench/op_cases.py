"""What bench_ops.py times: each op at the shapes of real models, and who else can do the same."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import attention_cases
import delta_rule_cases
import expert_cases
import kimi_delta_cases
import normed_cases
import routed_cases
import shared_cases
import torch
import torch.nn.functional as F
import wkv7_cases
import wkv_cases
from gpu_clock import Ceilings, copy_of, once
from normed_cases import FREE

from llmexport.plugins.spec import Attribute, all_ops
from llmexport.validate.tolerance import Tolerance

PREFILL = (4096, 4 * 4096)
DECODE = (1, 8, 64)
# Fractions of the floor at T = 4096 and 16384 (issue 3).
PREFILL_TARGETS = dict(zip(PREFILL, (0.85, 0.92), strict=True))
ROUTE_TARGET = 1 / 1.3  # as much above its floor as a token may be above a launch
Peer = Callable[..., object]


@dataclass(frozen=True)
class Family:
    """A published model: hidden size, heads, kv heads, head size, rotated pairs, intermediate size; halves: whether one
    projection makes gate and up; sandwiched: whether what is added to the residual is normed before."""

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
    halves: bool = False
    sandwiched: bool = False


FAMILIES = (
    Family("Gemma-2B", 2048, 8, 1, 256, 128, 16384, "gelu_tanh", 1.0),
    Family("Llama-3.1-8B", 4096, 32, 8, 128, 64, 14336),
    Family("Mistral-7B-v0.1", 4096, 32, 8, 128, 64, 14336),
    Family("Qwen2-7B", 3584, 28, 4, 128, 64, 18944),
    Family("GLM-4-9B", 4096, 32, 2, 128, 32, 13696, interleaved=True, halves=True, sandwiched=True),
)


@dataclass(frozen=True)
class Router:
    """How a published model picks K of E experts."""

    name: str
    E: int
    K: int
    scoring: str
    renormalise: bool = False
    scale: float = 1.0
    bias: bool = False
    groups: int = 1
    kept: int = 1


ROUTERS = (
    Router("Qwen3.5-35B-A3B", 256, 8, "softmax", renormalise=True),
    Router("gpt-oss-20b", 32, 4, "softmax_top_k"),
    Router("Llama-4-Scout", 16, 1, "sigmoid"),
    Router("DeepSeek-V3", 256, 8, "sigmoid", True, 2.5, bias=True, groups=8, kept=4),
)
# The linear attention of Qwen3.5-35B-A3B: channels and taps of its convolution, heads and head size of its norm.
CHANNELS, TAPS, NORM_HEADS, NORM_SIZE = 8192, 4, 32, 128
# Its states are [heads, size, size] too; a number of its convolution may fall on the other side of a tie, and be off by
# a unit of bf16 in what a state is summed from.
NET_STATE = Tolerance(2.0**-7, 2.0**-10, scaled=True)
# Its other attention: heads of q, each with a gate behind it, and of k, their size and the pairs of it that turn.
GATED_HEADS, GATED_KV, GATED_SIZE, GATED_PAIRS = 16, 2, 256, 32


@dataclass(frozen=True)
class Case:
    op: str
    family: str
    B: int
    T: int
    shapes: tuple[tuple[int, ...], ...]
    attributes: dict[str, Attribute]

    # To bf16, one after another, of the reference and so of the kernel.
    roundings: int = 1
    # Bytes of the inputs that it passes over.
    unread: int = 0
    fp32_tolerance: Tolerance = NET_STATE

    @property
    def bytes(self) -> int:
        """Read and written once each."""
        return sum(t.nbytes for t in (*self.on("meta"), *self.results())) - self.unread

    def results(self) -> list[torch.Tensor]:
        """The outputs' shapes and types, without values."""
        found = all_ops()[self.op].call(*self.on("meta"), *self.left_out, **self.attributes)
        return list(found) if isinstance(found, tuple) else [found]

    @property
    def left_out(self) -> list[None]:
        """The optional inputs that there are not."""
        return [None] * (len(all_ops()[self.op].inputs) - len(self.shapes))

    def floor(self, ceilings: Ceilings) -> float:
        """Seconds below which it cannot be, by what the GPU does at most."""
        # A prompt's logits are so few that launching is a part of the floor.
        return self.bytes / ceilings.copy + (ceilings.launch if self.op == "MoeRoute" else 0)

    @property
    def target(self) -> float:
        """The fraction of the floor to reach; 0 where launching is most of the time."""
        if self.op == "MoeRoute" and self.T > 1:
            return ROUTE_TARGET
        return PREFILL_TARGETS.get(self.T, 0.0)

    def on(self, device: str) -> list[torch.Tensor]:
        op = all_ops()[self.op]
        dtypes = {"int32": torch.int32, "float32": torch.float32}
        # All are tokens, up to where a row ends.
        filled = {"end": self.T, "present": 1, "write_indices": FREE}

        def made(name: str, shape: tuple[int, ...]) -> torch.Tensor:
            dtype = dtypes.get(op.types[name], torch.bfloat16)
            if name in filled:
                return torch.full(shape, filled[name], device=device, dtype=dtype)
            return torch.randn(shape, device=device, dtype=dtype)

        return [made(name, shape) for name, shape in zip(op.inputs, self.shapes, strict=False)]

    def inputs(self) -> list[torch.Tensor]:
        return self.on("cuda")

    def outputs(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Memory for the results: NaN, or -1."""
        # Contiguous, whatever the reference makes.
        made = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in self.results()]
        return [t.fill_(float("nan") if t.is_floating_point() else -1) for t in made]

    def timed_outputs(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """As an engine binds them: a result that may have an input's memory has it."""
        op = all_ops()[self.op]
        own = dict(zip(op.outputs, self.outputs(inputs), strict=True))
        given = dict(zip(op.inputs, inputs, strict=False))
        return [given[op.aliases[name]] if name in op.aliases else tensor for name, tensor in own.items()]

    def checked(self, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
        """What the reference says, beside what was found."""
        wanted = self.reference(*inputs)
        return list(zip(wanted if isinstance(wanted, tuple) else (wanted,), outputs, strict=True))

    @property
    def reference(self) -> Callable[..., Any]:
        """The op's torch reference with these attributes."""
        function, left_out, attributes = all_ops()[self.op].reference, self.left_out, self.attributes
        return lambda *inputs: function(*inputs, *left_out, **attributes)

    def peers(self) -> dict[str, Peer]:
        """Others that compute the same, by name; each takes the case's inputs."""
        # It compiles one function for a few shapes only, then quietly no more.
        torch._dynamo.reset()
        # The reference copies the cache of which it writes a part.
        function = eager(self) if all_ops()[self.op].aliases else self.reference
        compiled = torch.compile(function, mode="max-autotune-no-cudagraphs", dynamic=False)
        found: dict[str, Peer] = {"torch eager": eager(self), "torch.compile": compiled}
        if importlib.util.find_spec("flashinfer"):
            found |= flashinfer_peers(self)
        if importlib.util.find_spec("fla"):
            found |= fla_peers(self) | linear_attention_peers(self)
        return found

    def bounds(self) -> dict[str, Callable[..., Callable[[], object]]]:
        """What cannot be beaten, by name; each makes a call for a set of inputs."""
        return {"copy of the bytes": lambda *inputs: copy_of(self.bytes)}


def cases() -> Iterator[
    Case
    | attention_cases.AttentionCase
    | expert_cases.ExpertCase
    | delta_rule_cases.DeltaRuleCase
    | wkv_cases.WkvCase
    | wkv7_cases.Wkv7Case
    | normed_cases.NormedCase
    | normed_cases.BiasedCase
    | shared_cases.SharedCase
    | routed_cases.RoutedCase
]:
    """Every op of every family, each shape once."""
    yield from attention_cases.cases()
    yield from expert_cases.cases()
    yield from delta_rule_cases.cases()
    yield from kimi_delta_cases.cases()
    yield from wkv_cases.cases()
    yield from wkv7_cases.cases()
    yield from normed_cases.cases()
    yield from shared_cases.cases()
    yield from routed_cases.cases()
    seen: set[tuple[Any, ...]] = set()
    sizes = [*((1, t) for t in PREFILL), *((b, 1) for b in DECODE)]
    for family in FAMILIES:
        for B, T in sizes:
            for case in of_family(family, B, T):
                key = (case.op, case.shapes, tuple(case.attributes.items()))
                if key not in seen:
                    seen.add(key)
                    yield case
    for B, T in sizes:
        yield from of_linear_attention("Qwen3.5-35B-A3B", B, T)
        yield of_gated_attention("Qwen3.5-35B-A3B", B, T)
        yield from (of_router(router, B, T) for router in ROUTERS)


def of_family(f: Family, B: int, T: int) -> Iterator[Case]:
    angles = (B, T, f.R)
    rope = {"interleaved": f.interleaved}
    yield Case("Rope", f.name, B, T, ((B, f.H, T, f.D), angles, angles), rope)
    norm = {"epsilon": 1e-6, "weight_offset": f.weight_offset, "round_before_weight": f.weight_offset == 0}
    heads = ((B, T, f.H, f.D), *[(B, T, f.kv, f.D)] * 2, angles, angles, (f.D,), (f.D,))
    yield Case("QkNormRope", f.name, B, T, heads, {**rope, **norm, "norm_first": True}, roundings=3)
    cache = (B, f.kv, FREE + T, f.D)
    shapes = (*heads[:5], cache, cache, (B,), *heads[5:])
    # Of both caches, which are read and written, the rows of the step are written.
    rest = 2 * 2 * 2 * B * f.kv * f.D * (FREE + T) - 2 * 2 * B * f.kv * f.D * T
    said = {**rope, **norm, "norm_first": True}
    yield Case("QkNormRopeWrite", f.name, B, T, shapes, said, roundings=3, unread=rest)
    yield Case("AddRmsNorm", f.name, B, T, ((B, T, f.C), (B, T, f.C), (f.C,)), norm)
    if f.sandwiched:
        yield Case("AddRmsNorm", f.name, B, T, ((B, T, f.C), (B, T, f.C), (f.C,), (f.C,)), norm, roundings=3)
    act = {"activation": f.activation, "alpha": 0.0, "limit": 0.0}
    yield Case("GatedAct", f.name, B, T, ((B, T, 2 * f.I),) if f.halves else ((B, T, f.I), (B, T, f.I)), act)


def of_linear_attention(name: str, B: int, T: int) -> Iterator[Case]:
    conv = ((B, T, CHANNELS), (CHANNELS, 1, TAPS), (B, TAPS - 1, CHANNELS), (B,))
    yield Case("CausalConv1d", name, B, T, conv, {"activation": "silu"}, roundings=2)
    heads = (B, T, NORM_HEADS, NORM_SIZE)
    norm = {"epsilon": 1e-6, "activation": "silu", "round_before_weight": True}
    yield Case("GatedRmsNorm", name, B, T, (heads, heads, (NORM_SIZE,)), norm, roundings=3)
    if T == 1:
        gates, own = [(B, T, NORM_HEADS)] * 2, [(NORM_HEADS,)] * 2
        state = (B, NORM_HEADS, NORM_SIZE, NORM_SIZE)
        said = {"scale": NORM_SIZE**-0.5, "l2_norm": True, **norm}
        yield Case("GatedDeltaNet", name, B, T, (*conv, *gates, (B, T), *own, heads, (NORM_SIZE,), state), said, 5)


def of_gated_attention(name: str, B: int, T: int) -> Case:
    q, k = (B, T, GATED_HEADS, 2 * GATED_SIZE), (B, T, GATED_KV, GATED_SIZE)
    angles, weight = (B, T, GATED_PAIRS), (GATED_SIZE,)
    said = {"interleaved": False, "epsilon": 1e-6, "weight_offset": 1.0, "round_before_weight": False}
    shapes = (q, k, k, angles, angles, weight, weight)
    gates = 2 * B * T * GATED_HEADS * GATED_SIZE
    return Case("QkNormRope", name, B, T, shapes, {**said, "norm_first": True}, roundings=3, unread=gates)


def of_router(r: Router, B: int, T: int) -> Case:
    attributes = {"top_k": r.K, "scoring": r.scoring, "renormalise": r.renormalise, "scale": r.scale}
    attributes |= {"groups": r.groups, "groups_kept": r.kept, "group_best": 2}
    return Case("MoeRoute", r.name, B, T, ((B, T, r.E), *[(r.E,)] * r.bias), attributes)


def eager(case: Case) -> Peer:
    """The fewest calls that torch has for it."""
    if case.op == "GatedAct":
        approximate = "tanh" if case.attributes["activation"] == "gelu_tanh" else "none"
        silu = case.attributes["activation"] == "silu"
        act: Callable[..., torch.Tensor] = F.silu if silu else functools.partial(F.gelu, approximate=approximate)

        def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
            return act(gate) * up

        return (lambda both: gated(*both.chunk(2, -1))) if case.left_out else gated
    if case.op == "AddRmsNorm" and case.left_out and not case.attributes["weight_offset"]:
        return lambda x, residual, weight: F.rms_norm(x + residual, weight.shape, weight, 1e-6)
    if case.op == "GatedRmsNorm":
        return lambda x, gate, weight: F.rms_norm(x, weight.shape, weight, 1e-6) * F.silu(gate)
    if case.op == "MoeRoute" and case.attributes["groups"] == 1:
        return eager_route(case)
    if case.op == "QkNormRopeWrite":
        return functools.partial(eager_write, case.attributes)
    return case.reference


def eager_write(attributes: dict[str, Attribute], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """In place, as a model's static cache is."""
    *step, past_key, past_value, starts, q_weight, k_weight = tensors
    query, *made = all_ops()["QkNormRope"].reference(*step, q_weight, k_weight, **attributes)
    slots = starts[:, None] + torch.arange(query.shape[2], device=starts.device)
    rows = torch.arange(len(starts), device=starts.device)[:, None]
    for past, new in zip((past_key, past_value), made, strict=True):
        past[rows, :, slots] = new.transpose(1, 2)
    return query, past_key, past_value


def eager_route(case: Case) -> Peer:
    """As models call it: torch.topk, which does not say which expert wins a tie."""
    k, scoring = int(case.attributes["top_k"]), case.attributes["scoring"]

    def route(logits: torch.Tensor) -> object:
        if scoring == "softmax_top_k":
            best, experts = logits.topk(k)
            return best.softmax(-1), experts
        if scoring == "sigmoid":
            best, experts = logits.topk(k)
            return best.float().sigmoid().to(logits.dtype), experts
        weights, experts = logits.softmax(-1, dtype=torch.float32).topk(k)
        return (weights / weights.sum(-1, keepdim=True)).to(logits.dtype), experts

    return route


def flashinfer_peers(case: Case) -> dict[str, Peer]:
    """flashinfer gates the halves of one tensor and adds in place; bytes moved are the same."""
    import flashinfer

    if case.op == "GatedAct":
        acts = {"silu": flashinfer.silu_and_mul, "gelu_tanh": flashinfer.gelu_tanh_and_mul}
        act = acts[str(case.attributes["activation"])]
        if case.left_out:
            return {"flashinfer": lambda both: act(both.flatten(0, 1))}
        joined = once(lambda gate, up: torch.cat((gate, up), -1).flatten(0, 1))
        return {"flashinfer": lambda gate, up: act(joined(gate, up))}
    if case.op == "AddRmsNorm" and case.left_out:
        norm = flashinfer.gemma_fused_add_rmsnorm if case.attributes["weight_offset"] else flashinfer.fused_add_rmsnorm
        return {"flashinfer": lambda x, residual, weight: norm(x.flatten(0, 1), residual.flatten(0, 1), weight, 1e-6)}
    return {}


def fla_peers(case: Case) -> dict[str, Peer]:
    from fla.modules.activations import swiglu
    from fla.modules.layernorm import rms_norm

    if case.op == "GatedAct" and case.attributes["activation"] == "silu" and not case.left_out:
        return {"fla": swiglu}
    if case.op == "AddRmsNorm" and case.left_out and not case.attributes["weight_offset"]:
        return {"fla": lambda x, residual, weight: rms_norm(x, weight, None, residual=residual, eps=1e-6, prenorm=True)}
    return {}


def linear_attention_peers(case: Case) -> dict[str, Peer]:
    """fla keeps one input more in its state, [B, C, K], and starts a prompt without one; it updates a state in place.

    What it has is imported when it is called: its modules move, and a peer that is not there is a result.
    """
    if case.op == "GatedRmsNorm":

        def norm(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor) -> object:
            from fla.modules.fused_norm_gate import rms_norm_gated

            return rms_norm_gated(x, gate, weight, None, activation="swish", eps=1e-6)

        return {"fla": norm}
    if case.op == "CausalConv1d":
        longer = once(lambda state: torch.cat((state[:, :1], state), 1).transpose(1, 2).contiguous())

        def conv(x: torch.Tensor, weight: torch.Tensor, state: torch.Tensor, end: torch.Tensor) -> object:
            from fla.modules.convolution import causal_conv1d, causal_conv1d_update

            if case.T > 1:
                return causal_conv1d(x, weight[:, 0], activation="silu", output_final_state=True)
            return causal_conv1d_update(x, longer(state), weight=weight[:, 0], activation="silu")

        return {"fla": conv}
    return {}
