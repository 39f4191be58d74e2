"""Layers that compute sums, products and orders; numbers of 16 bits reach them as float32."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import numpy as np

from llmexport.export.network.kinds import Array, Compute, bits, named, numpy_type, only, scalar

REDUCE: MappingProxyType[str, Callable[..., Array]] = MappingProxyType(
    {"SUM": np.sum, "PROD": np.prod, "MAX": np.max, "MIN": np.min, "AVG": np.mean}
)


def reduce(layer: Any) -> Compute:
    function, axes, keep = named("operation", REDUCE, layer.op), bits(layer.axes), layer.keep_dims
    return lambda x: function(x, axis=axes, keepdims=keep)


def cumulative(layer: Any) -> Compute:
    only("operation", layer.op, "SUM")
    exclusive, back = layer.exclusive, layer.reverse

    def compute(x: Array, axis: Array) -> Array:
        along = scalar(axis)
        x = np.flip(x, along) if back else x
        made = np.cumsum(x, along, dtype=x.dtype)
        if exclusive:
            made = np.roll(made, 1, along)
            made[(slice(None),) * (along % x.ndim) + (slice(1),)] = 0
        return np.flip(made, along) if back else made

    return compute


def top_k(layer: Any) -> Compute:
    """Of equals the first comes first."""
    [axis], held = bits(layer.axes), layer.k
    sign = named("operation", {"MAX": -1, "MIN": 1}, layer.op)
    index_type = numpy_type(layer.get_output(1).dtype)

    def compute(x: Array, k: Array | None = None) -> tuple[Array, Array]:
        order = np.argsort(sign * x, axis, kind="stable")
        best = np.take(order, range(held if k is None else scalar(k)), axis)
        return np.take_along_axis(x, best, axis), best.astype(index_type)

    return compute


def softmax(layer: Any) -> Compute:
    axes = bits(layer.axes)
    return lambda x: exponentials(x, axes)


def exponentials(x: Array, axes: tuple[int, ...]) -> Array:
    """Each one's share of the sum."""
    powers = np.exp(x - x.max(axes, keepdims=True))
    return powers / powers.sum(axes, keepdims=True)


def matrix_multiply(layer: Any) -> Compute:
    turned = [named("operation", {"NONE": False, "TRANSPOSE": True}, op) for op in (layer.op0, layer.op1)]

    def compute(a: Array, b: Array) -> Array:
        a, b = (np.swapaxes(x, -1, -2) if turn else x for x, turn in zip((a, b), turned, strict=True))
        return a @ b

    return compute


def einsum(layer: Any) -> Compute:
    equation = layer.equation
    return lambda *given: np.einsum(equation, *given, optimize=True)


def normalization(layer: Any) -> Compute:
    only("groups", layer.num_groups, 1)
    axes, epsilon = bits(layer.axes), np.float32(layer.epsilon)

    def compute(x: Array, scale: Array, bias: Array) -> Array:
        centred = x - x.mean(axes, keepdims=True)
        variance = np.square(centred).mean(axes, keepdims=True)
        return centred / np.sqrt(variance + epsilon) * scale + bias

    return compute
