"""The layouts that experts are published in, as tensors and in float64; shared by the tests of MoeExperts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmexport.plugins.microscaling import BLOCK, VALUES
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
    mxfp4: bool = False

    @property
    def attributes(self) -> dict[str, Any]:
        return {
            "activation": self.activation,
            "alpha": ALPHA,
            "limit": LIMIT,
            "transposed": self.transposed,
            "interleaved": self.interleaved,
            "scale_input": self.scale_input,
        }

    def __call__(self, tensors: dict[str, Tensor]) -> Tensor:
        absent = dict.fromkeys(OPTIONAL)
        return moe_experts(**{**absent, **tensors}, **self.attributes)


OPTIONAL = ("gate_up_bias", "down_bias", "gate_up_scales", "down_scales")
LAYOUTS = {
    "qwen": Layout(),
    "gemma": Layout("gelu_tanh"),
    "llama4": Layout(transposed=True, scale_input=True),
    "gpt_oss": Layout("swiglu_clamped", transposed=True, interleaved=True, bias=True),
    "mxfp4": Layout("swiglu_clamped", interleaved=True, bias=True, mxfp4=True),
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

    def matrix(rows: int, columns: int) -> Tensor:
        if layout.mxfp4:
            return torch.randint(0, 256, (count, rows, columns // 2), generator=seed, dtype=torch.uint8)
        shape = (columns, rows) if layout.transposed else (rows, columns)
        return (random(count, *shape) * columns**-0.5).to(stored or dtype)

    def exponents(rows: int, columns: int) -> Tensor:
        return torch.randint(122, 126, (count, rows, columns // BLOCK), generator=seed, dtype=torch.uint8)

    picked = torch.rand(*tokens, count, generator=seed).argsort(-1)[..., :top_k].int()
    tensors = {"x": random(*tokens, hidden).to(dtype), "weights": torch.rand(*tokens, top_k, generator=seed).to(dtype)}
    tensors["experts"] = picked if experts is None else experts.int()
    tensors |= {"gate_up": matrix(2 * middle, hidden), "down": matrix(hidden, middle)}
    if layout.bias:
        tensors |= {"gate_up_bias": random(count, 2 * middle).to(dtype), "down_bias": random(count, hidden).to(dtype)}
    if layout.mxfp4:
        tensors |= {"gate_up_scales": exponents(2 * middle, hidden), "down_scales": exponents(hidden, middle)}
    return tensors


def decode(packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """MXFP4 by its definition: two codes a byte, the low one first; 32 values share a power of two."""
    table = np.array(VALUES)
    pairs = np.stack((table[packed % 16], table[packed // 16]), -1).reshape(*packed.shape[:-1], -1)
    return pairs * np.repeat(2.0 ** (scales.astype(np.float64) - 127), BLOCK, -1)


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
            if layout.mxfp4:
                first, second = decode(first, wide["gate_up_scales"][e]), decode(second, wide["down_scales"][e])
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
