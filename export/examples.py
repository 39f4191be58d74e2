"""Blocks of no model: small ones, by the names that people know, which export alone and without a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from llmexport.export.assembly import alone
from llmexport.export.errors import ExportError
from llmexport.export.spec import (
    Activation,
    Alibi,
    Arch,
    Attention,
    Block,
    Layer,
    Mlp,
    Model,
    Norm,
    Part,
    Reference,
    RelativeBias,
    Rotary,
    Sublayer,
)

NAME = "block"  # in place of an architecture's
HIDDEN, HEADS, SIZE, WIDE, DEPTH = 64, 8, 8, 160, 12
ALPHA = (2 * DEPTH) ** 0.25  # of DeepNorm in a decoder of so many layers

_NORM = Norm(HIDDEN, 1e-5, statistics="layer", bias=True)


def _plain(wide: int, activation: Activation) -> Mlp:
    return Mlp(HIDDEN, wide, activation, bias=True, gated=False)


def _attention(kv_heads: int, *, masked: bool = True) -> Attention:
    """Over one text, with a bias on every matrix and without positions."""
    fields: dict[str, Any] = {"qkv_bias": True, "out_bias": True, "rotated": 0, "cached": False}
    return Attention(HIDDEN, HEADS, kv_heads, SIZE, masked=masked, **fields)


def _deep_norm(scale: float, kept: float) -> Layer:
    """A layer that norms its sums, of what each sublayer gives and what went into it, one of which has a factor."""
    blocks = {"self_attn": _attention(HEADS, masked=False), "mlp": _plain(4 * HIDDEN, "relu")}
    return Layer(tuple(Sublayer(n, b, sum_norm=_NORM, scale=scale, kept=kept) for n, b in blocks.items()))


EXAMPLES: Mapping[str, Block] = MappingProxyType(
    {
        "alibi": Alibi(HEADS),
        # The paper multiplies what goes into a sublayer (arXiv 2203.00555), as ChatGLM-6B does; other descriptions
        # multiply what the sublayer gives, which is another function.
        "deep_norm": _deep_norm(1.0, ALPHA),
        "deep_norm_of_sublayers": _deep_norm(ALPHA, 1.0),
        "gelu": _plain(WIDE, "gelu_erf"),
        "gelu_sigmoid": _plain(WIDE, "gelu_sigmoid"),
        "gelu_tanh": _plain(WIDE, "gelu_tanh"),
        "gqa": _attention(2),
        "layer_norm": _NORM,
        "mha": _attention(HEADS),
        "mqa": _attention(1),
        # T5's, of an encoder; a decoder has no buckets for keys before the query.
        "relative_bias": RelativeBias(HEADS, 32, 128, both_ways=True),
        "rms_norm": Norm(HIDDEN, 1e-6),
        "rotary": Rotary(SIZE, 10000.0),
        "swiglu": Mlp(HIDDEN, WIDE, "silu"),
    }
)


def example(name: str) -> Arch:
    """What exports one of these as an architecture does a model. Raises ExportError on a name that there is not."""
    if name not in EXAMPLES:
        raise ExportError(
            f"no block {name!r} stands alone, there are {', '.join(EXAMPLES)}: "
            "for a block of an architecture say --arch NAME, or --checkpoint DIR"
        )
    graph = alone(Part(name, EXAMPLES[name], ""))
    return Arch(
        model_types=(NAME,),
        reference=Reference("", {}),
        build=lambda config: Model((graph,), {}),
        names={"": ""},
        tiny={},
        base="",
        name=NAME,
    )
