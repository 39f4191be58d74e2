"""Torch ops that export as exactly one standard ONNX operator, whichever torch version traces them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from onnx import TensorProto
from torch import Tensor

from llmexport.plugins.slots import written

BOOL = TensorProto.DataType.BOOL


@torch.library.custom_op("llmexport::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """ai.onnx RMSNormalization-23: x [..., C] normalised in fp32, rounded to x's dtype, times weight [C]."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return normed.to(x.dtype) * weight


@torch.library.custom_op("llmexport::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """ai.onnx Attention-23 with a boolean mask, or without any.

    q [B, H, T, D]; k [B, Hkv, S, D]; v [B, Hkv, S, Dv], H a multiple of Hkv; mask [B, 1, T, S], true where visible.
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)


@torch.library.custom_op("llmexport::tensor_scatter", mutates_args=())
def tensor_scatter(past: Tensor, update: Tensor, write_indices: Tensor) -> Tensor:
    """ai.onnx TensorScatter-24: past [B, H, S, D] with update [B, H, T, D] written from slot write_indices [B] on.

    Fails where a row would be written beyond S, as ONNX Runtime does; TensorRT does not tell.
    """
    return written(past, update, write_indices)


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
attention.register_fake(lambda q, k, v, mask, scale: q.new_empty((*q.shape[:-1], v.shape[-1])))
tensor_scatter.register_fake(lambda past, update, write_indices: torch.empty_like(past))
padding_must_be_on_the_left.register_fake(lambda between: torch.empty_like(between))


def translations() -> dict[Any, Callable[..., Any]]:
    """The exporter's table for these ops: torch op -> what emits its ONNX operator."""
    from onnxscript import opset23 as ai_onnx
    from onnxscript.values import Opset

    opset_24 = Opset("", 24)

    def rms_normalization(x: Any, weight: Any, epsilon: float) -> Any:
        return ai_onnx.RMSNormalization(x, weight, axis=-1, epsilon=epsilon, stash_type=1)

    def attention_23(q: Any, k: Any, v: Any, mask: Any, scale: float) -> Any:
        # onnxscript gives the operator all its optional outputs; the trace drops the unused ones.
        return ai_onnx.Attention(q, k, v, mask, scale=scale)[0]

    def gather(between: Any) -> Any:
        nothing: Any = ai_onnx.Constant(value_ints=[0])
        return ai_onnx.Gather(nothing, between)

    def scatter(past: Any, update: Any, write_indices: Any) -> Any:
        return opset_24.TensorScatter(past, update, write_indices, axis=-2, mode="linear")

    def cast(x: Any, dtype: int) -> Any:
        return ai_onnx.Identity(x) if x.dtype == dtype else ai_onnx.Cast(x, to=dtype)

    def taken_from(x: Any, number: float) -> Any:
        return ai_onnx.Sub(number, x)

    def square(x: Any) -> Any:
        two: Any = 2.0
        return ai_onnx.Pow(x, two)

    def both(x: Any, y: Any) -> Any:
        return ai_onnx.And(x, y) if x.dtype == BOOL else ai_onnx.BitwiseAnd(x, y)

    def either(x: Any, y: Any) -> Any:
        return ai_onnx.Or(x, y) if x.dtype == BOOL else ai_onnx.BitwiseOr(x, y)

    return {
        # Untranslated elsewhere, as they are usually decomposed; see shortcuts.py.
        torch.ops.aten.to.dtype: cast,
        torch.ops.aten.rsub.Scalar: taken_from,
        torch.ops.aten.square.default: square,
        torch.ops.aten.__and__.Tensor: both,
        torch.ops.aten.__or__.Tensor: either,
        torch.ops.llmexport.rms_norm.default: rms_normalization,
        torch.ops.llmexport.attention.default: attention_23,
        torch.ops.llmexport.padding_must_be_on_the_left.default: gather,
        torch.ops.llmexport.tensor_scatter.default: scatter,
    }
