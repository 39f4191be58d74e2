"""Torch ops that export as exactly one standard ONNX operator, whichever torch version traces them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("llmexport::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """ai.onnx RMSNormalization-23: x [..., C] normalised in fp32, rounded to x's dtype, times weight [C]."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return normed.to(x.dtype) * weight


@torch.library.custom_op("llmexport::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """ai.onnx Attention-23 with a boolean mask.

    q [B, H, T, D]; k, v [B, Hkv, S, D], H a multiple of Hkv; mask [B, 1, T, S], true where visible.
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)


@torch.library.custom_op("llmexport::padding_must_be_on_the_left", mutates_args=())
def padding_must_be_on_the_left(between: Tensor) -> Tensor:
    """Zeros [B] where `between` [B] int64 is 0; fails where one is 1.

    ai.onnx Gather from a tensor of one element, which ONNX Runtime refuses to read beyond its end, naming the node;
    no optimiser can tell that it never does. TensorRT has no such check.
    """
    if between.any():
        raise ValueError("attention_mask hides tokens between others: padding must be on the left")
    return torch.zeros_like(between)


rms_norm.register_fake(lambda x, weight, epsilon: torch.empty_like(x))
attention.register_fake(lambda q, k, v, mask, scale: torch.empty_like(q))
padding_must_be_on_the_left.register_fake(lambda between: torch.empty_like(between))


def translations() -> dict[Any, Callable[..., Any]]:
    """The exporter's table for these ops: torch op -> what emits its ONNX operator."""
    from onnxscript import opset23 as ai_onnx

    def rms_normalization(x: Any, weight: Any, epsilon: float) -> Any:
        return ai_onnx.RMSNormalization(x, weight, axis=-1, epsilon=epsilon, stash_type=1)

    def attention_23(q: Any, k: Any, v: Any, mask: Any, scale: float) -> Any:
        # onnxscript gives the operator all its optional outputs; the trace drops the unused ones.
        return ai_onnx.Attention(q, k, v, mask, scale=scale)[0]

    def gather(between: Any) -> Any:
        nothing: Any = ai_onnx.Constant(value_ints=[0])
        return ai_onnx.Gather(nothing, between)

    def cast(x: Any, dtype: int) -> Any:
        return ai_onnx.Identity(x) if x.dtype == dtype else ai_onnx.Cast(x, to=dtype)

    return {
        # Untranslated elsewhere, as it is usually decomposed; see trace.py.
        torch.ops.aten.to.dtype: cast,
        torch.ops.llmexport.rms_norm.default: rms_normalization,
        torch.ops.llmexport.attention.default: attention_23,
        torch.ops.llmexport.padding_must_be_on_the_left.default: gather,
    }
