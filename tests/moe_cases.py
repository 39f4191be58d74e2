"""The layouts that experts are published in, as tensors and in float64; shared by the tests of MoeExperts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from llmexport.plugins.microscaling import BLOCK
from llmexport.plugins.moe_experts import moe_experts
from llmexport.validate.compare import compare
from llmexport.validate.tolerance import Tolerance

ALPHA, LIMIT = 1.702, 1.5  # GPT-OSS's alpha; a limit that many of the values below pass
E, K, C, I = 6, 3, 64, 32  # noqa: E741


@dataclass(frozen=True)
class Layout:
    activation: str = "silu"
    transposed: bool = False
    interleaved: bool = False
    scale_input: bool = False
    bias: bool = False
    format: str = "plain"
    group: int = 0
    factors: bool = False
    zeros: bool = False

    @property
    def attributes(self) -> dict[str, Any]:
        return {
            "activation": self.activation,
            "alpha": ALPHA,
            "limit": LIMIT,
            "transposed": self.transposed,
            "interleaved": self.interleaved,
            "scale_input": self.scale_input,
            "format": self.format,
            "group": self.group,
        }

    @property
    def packed(self) -> bool:
        return self.format != "plain"

    def __call__(self, tensors: dict[str, Tensor]) -> Tensor:
        absent = dict.fromkeys(OPTIONAL)
        return moe_experts(**{**absent, **tensors}, **self.attributes)


OPTIONAL = tuple(f"{n}_{what}" for what in ("bias", "scales", "factors", "zeros") for n in ("gate_up", "down"))
LAYOUTS = {
    "qwen": Layout(),
    "gemma": Layout("gelu_tanh"),
    "llama4": Layout(transposed=True, scale_input=True),
    "gpt_oss": Layout("swiglu_clamped", transposed=True, interleaved=True, bias=True),
    "mxfp4": Layout("swiglu_clamped", interleaved=True, bias=True, format="mxfp4", group=BLOCK),
}
# One of each format, two with zero points, in groups that fill no row, fill one, and have one column.
FORMATS = {
    "mxfp8": Layout(bias=True, format="mxfp8", group=BLOCK),
    "nvfp4": Layout("gelu_erf", bias=True, format="nvfp4", group=16, factors=True),
    "nvfp4-interleaved": Layout(interleaved=True, bias=True, format="nvfp4", group=16, factors=True),
    "fp8": Layout(scale_input=True, bias=True, format="fp8", group=24),
    "fp8-rows": Layout(bias=True, format="fp8", group=10**6, factors=True),
    "int8": Layout("gelu_tanh", bias=True, format="int8", group=1),
    "uint4": Layout(interleaved=True, bias=True, format="uint4", group=24),
    "uint4-zeros": Layout(bias=True, format="uint4", group=16, factors=True, zeros=True),
    "uint8": Layout(bias=True, format="uint8", group=32),
    "uint8-zeros": Layout(interleaved=True, bias=True, format="uint8", group=24, factors=True, zeros=True),
}


def example(
    layout: Layout,
    tokens: tuple[int, int] = (1, 7),
    dtype: torch.dtype = torch.float32,
    stored: torch.dtype | None = None,
    experts: Tensor | None = None,
    sizes: tuple[int, int, int, int] = (E, K, C, I),
) -> dict[str, Tensor]:
    """Tensors of order one, their weights of type `stored`; every token goes to K different experts."""
    count, top_k, hidden, middle = sizes
    seed = torch.Generator().manual_seed(sum(tokens) + sum(sizes))

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=seed)

    def numbers(*shape: int, least: int = 0, end: int = 256) -> Tensor:
        return torch.randint(least, end, shape, generator=seed, dtype=torch.uint8)

    def matrix(rows: int, columns: int) -> Tensor:
        if layout.packed:
            codes = numbers(count, rows, columns * BITS[layout.format] // 8)
            # NaN, of either sign.
            return codes.masked_fill(codes & 127 == 127, 0) if layout.format in ("fp8", "mxfp8") else codes
        shape = (columns, rows) if layout.transposed else (rows, columns)
        return (random(count, *shape) * columns**-0.5).to(stored or dtype)

    def scales(rows: int, columns: int) -> Tensor:
        """With which weights are of order one by the root of their columns."""
        shape = (count, rows, math.ceil(columns / layout.group))
        if layout.format == "mxfp4":
            return numbers(*shape, least=122, end=126)
        if layout.format == "mxfp8":
            return numbers(*shape, least=115, end=119)
        if layout.format == "nvfp4":
            return numbers(*shape, least=16, end=40)
        largest = {"fp8": 448, "int8": 128, "uint8": 128, "uint4": 8}[layout.format]
        return (0.5 + torch.rand(shape, generator=seed)) / largest

    picked = torch.rand(*tokens, count, generator=seed).argsort(-1)[..., :top_k].int()
    tensors = {"x": random(*tokens, hidden).to(dtype), "weights": torch.rand(*tokens, top_k, generator=seed).to(dtype)}
    tensors["experts"] = picked if experts is None else experts.int()
    tensors |= {"gate_up": matrix(2 * middle, hidden), "down": matrix(hidden, middle)}
    if layout.bias:
        tensors |= {"gate_up_bias": random(count, 2 * middle).to(dtype), "down_bias": random(count, hidden).to(dtype)}
    if layout.packed:
        tensors |= {"gate_up_scales": scales(2 * middle, hidden), "down_scales": scales(hidden, middle)}
    if layout.factors:
        parts = {"gate_up": 2, "down": 1}
        tensors |= {f"{n}_factors": 0.5 + torch.rand(count, m, generator=seed) for n, m in parts.items()}
    if layout.zeros:
        end = 2 ** BITS[layout.format]
        shapes = {n: tensors[f"{n}_scales"].shape for n in ("gate_up", "down")}
        tensors |= {f"{n}_zeros": numbers(*shape, least=end // 4, end=3 * end // 4) for n, shape in shapes.items()}
    return tensors


BITS = {"mxfp4": 4, "nvfp4": 4, "uint4": 4, "mxfp8": 8, "fp8": 8, "uint8": 8, "int8": 8}
# What formats call numbers by the names of ml_dtypes; zero points where a node has none.
NUMBERS = {"mxfp4": "float4_e2m1fn", "nvfp4": "float4_e2m1fn", "mxfp8": "float8_e4m3fn", "fp8": "float8_e4m3fn"}
NUMBERS |= {"int8": "int8", "uint8": "uint8", "uint4": "uint8"}
SCALES = {"mxfp4": "float8_e8m0fnu", "mxfp8": "float8_e8m0fnu", "nvfp4": "float8_e4m3fn"}
ZERO = {"uint4": 8, "uint8": 128}


def read_as(codes: np.ndarray, name: str) -> np.ndarray:
    return codes.view(getattr(ml_dtypes, name, None) or name).astype(np.float64)


def decode(layout: Layout, name: str, expert: dict[str, np.ndarray]) -> np.ndarray:
    """A matrix of an expert by the definition of its format: of 4 bits two codes a byte, the low one first."""
    codes, scales = expert[name], expert[f"{name}_scales"]
    if BITS[layout.format] == 4:
        codes = np.stack((codes & 15, codes >> 4), -1).reshape(len(codes), -1)
    if layout.format in SCALES:
        scales = read_as(scales, SCALES[layout.format])
    zeros = expert.get(f"{name}_zeros", np.full_like(scales, ZERO.get(layout.format, 0)))
    at = np.arange(codes.shape[1]) // layout.group
    wide = (read_as(codes, NUMBERS[layout.format]) - zeros[:, at]) * scales[:, at]
    own = expert.get(f"{name}_factors", np.ones(1))
    part = np.arange(len(wide)) % len(own) if layout.interleaved else np.arange(len(wide)) * len(own) // len(wide)
    return wide * own[part, None]


def activate(gate: np.ndarray, up: np.ndarray, activation: str) -> np.ndarray:
    if activation == "silu":
        return gate / (1 + np.exp(-gate)) * up
    if activation == "gelu_tanh":
        return 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up
    if activation == "gelu_erf":
        return 0.5 * gate * (1 + np.vectorize(math.erf)(gate / math.sqrt(2))) * up
    gate, up = np.minimum(gate, LIMIT), np.clip(up, -LIMIT, LIMIT)
    return gate / (1 + np.exp(-ALPHA * gate)) * (up + 1)


def exact(layout: Layout, tensors: dict[str, Tensor]) -> np.ndarray:
    """The op by its definition, token by token, in float64."""
    wide = {n: t.numpy() if t.dtype == torch.uint8 else t.double().numpy() for n, t in tensors.items()}
    x, weights = wide["x"], wide["weights"]
    y = np.zeros_like(x)
    for at in np.ndindex(x.shape[:2]):
        for k, e in enumerate(tensors["experts"][at].tolist()):
            first, second = wide["gate_up"][e], wide["down"][e]
            if layout.packed:
                expert = {n: wide[n][e] for n in wide if n.startswith(("gate_up", "down"))}
                first, second = decode(layout, "gate_up", expert), decode(layout, "down", expert)
            first, second = (first.T, second.T) if layout.transposed else (first, second)
            both = first @ (x[at] * weights[at][k] if layout.scale_input else x[at])
            both = both + wide["gate_up_bias"][e] if layout.bias else both
            gate, up = (both[0::2], both[1::2]) if layout.interleaved else np.split(both, 2)
            out = second @ activate(gate, up, layout.activation)
            out = out + wide["down_bias"][e] if layout.bias else out
            y[at] += out if layout.scale_input else out * weights[at][k]
    return y


def excess(expected: Tensor | np.ndarray, found: Tensor) -> float:
    """How many times the bound of found's dtype the difference is.

    fp32: two sums of up to 64 products, in any order; 3.4 epsilons of the largest value and 3.1 of the rms were
    measured. 16 bits: half an epsilon at each of two projections, two biases, the gate and the result; 1.0 and 0.7
    were, and 1.7 and 1.1 where transformers sums in those bits.
    """
    largest, rms = (16, 8) if found.dtype == torch.float32 else (3, 1.5)
    eps = torch.finfo(found.dtype).eps
    wide = expected if isinstance(expected, np.ndarray) else expected.double().numpy()
    return compare(wide, found.double().numpy()).excess(Tolerance(largest * eps, rms * eps, scaled=True))
