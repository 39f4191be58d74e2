"""Layers that compute each number by itself; those of 16 bits reach them as float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import numpy as np

from llmexport.export.network.kinds import Array, Compute, Unable, named, numpy_type, only


def _quotient(a: Array, b: Array) -> Array:
    """Integers are divided towards zero."""
    if not np.issubdtype(a.dtype, np.integer):
        return a / b
    down = a // b
    return down + ((down * b != a) & ((a < 0) != (b < 0)))


ELEMENTWISE: MappingProxyType[str, Callable[[Array, Array], Array]] = MappingProxyType(
    {
        "SUM": np.add,
        "SUB": np.subtract,
        "PROD": np.multiply,
        "DIV": _quotient,
        "FLOOR_DIV": np.floor_divide,
        "POW": np.power,
        "MAX": np.maximum,
        "MIN": np.minimum,
        "AND": np.logical_and,
        "OR": np.logical_or,
        "XOR": np.logical_xor,
        "EQUAL": np.equal,
        "GREATER": np.greater,
        "LESS": np.less,
    }
)


def erf(x: Array) -> Array:
    return np.frompyfunc(math.erf, 1, 1)(x).astype(x.dtype)


UNARY: MappingProxyType[str, Callable[[Array], Array]] = MappingProxyType(
    {
        "EXP": np.exp,
        "LOG": np.log,
        "SQRT": np.sqrt,
        "RECIP": np.reciprocal,
        "ABS": np.abs,
        "NEG": np.negative,
        "SIN": np.sin,
        "COS": np.cos,
        "TAN": np.tan,
        "SINH": np.sinh,
        "COSH": np.cosh,
        "ASIN": np.arcsin,
        "ACOS": np.arccos,
        "ATAN": np.arctan,
        "ASINH": np.arcsinh,
        "ACOSH": np.arccosh,
        "ATANH": np.arctanh,
        "CEIL": np.ceil,
        "FLOOR": np.floor,
        "ROUND": np.round,
        "SIGN": np.sign,
        "ERF": erf,
        "NOT": np.logical_not,
        "ISINF": np.isinf,
        "ISNAN": np.isnan,
    }
)
# Of (x, alpha, beta).
ACTIVATION: MappingProxyType[str, Callable[[Array, float, float], Array]] = MappingProxyType(
    {
        "RELU": lambda x, a, b: np.maximum(x, 0),
        "SIGMOID": lambda x, a, b: 1 / (1 + np.exp(-x)),
        "TANH": lambda x, a, b: np.tanh(x),
        "LEAKY_RELU": lambda x, a, b: np.where(x < 0, a * x, x),
        "ELU": lambda x, a, b: np.where(x < 0, a * np.expm1(x), x),
        "SELU": lambda x, a, b: b * np.where(x < 0, a * np.expm1(x), x),
        "SOFTSIGN": lambda x, a, b: x / (1 + np.abs(x)),
        "SOFTPLUS": lambda x, a, b: a * np.logaddexp(b * x, 0),
        "CLIP": lambda x, a, b: np.clip(x, a, b),
        "HARD_SIGMOID": lambda x, a, b: np.clip(a * x + b, 0, 1),
        "SCALED_TANH": lambda x, a, b: a * np.tanh(b * x),
        "THRESHOLDED_RELU": lambda x, a, b: np.where(x > a, x, 0),
        "GELU_ERF": lambda x, a, b: 0.5 * x * (1 + erf(x * np.float32(0.5**0.5))),
        "GELU_TANH": lambda x, a, b: 0.5 * x * (1 + np.tanh(np.float32((2 / math.pi) ** 0.5) * (x + 0.044715 * x**3))),
    }
)


def elementwise(layer: Any) -> Compute:
    return named("operation", ELEMENTWISE, layer.op)


def unary(layer: Any) -> Compute:
    return named("operation", UNARY, layer.op)


def activation(layer: Any) -> Compute:
    function, alpha, beta = named("function", ACTIVATION, layer.type), layer.alpha, layer.beta
    # Python's floats leave an array its type.
    return lambda x: function(x, alpha, beta)


def quantize(layer: Any) -> Compute:
    """The nearest, of two as near the even one, within the type."""
    dtype, per = numpy_type(layer.get_output(0).dtype), _scale(layer)
    only("type", dtype.name, "int8")
    return lambda x, scale, zero=None: np.clip(np.round(x / per(x, scale)), -128, 127)


def dequantize(layer: Any) -> Compute:
    per = _scale(layer)
    return lambda x, scale, zero=None: x.astype(np.float32) * per(x, scale)


def _scale(layer: Any) -> Callable[[Array, Array], Array]:
    """One scale, one an entry of an axis, or one a block."""
    axis = layer.axis

    def shaped(x: Array, scale: Array) -> Array:
        if scale.size == 1:
            return scale.reshape(())
        if scale.ndim == x.ndim and all(n % m == 0 for n, m in zip(x.shape, scale.shape, strict=True)):
            for i, (n, m) in enumerate(zip(x.shape, scale.shape, strict=True)):
                scale = np.repeat(scale, n // m, i)
            return scale
        if scale.shape != (x.shape[axis],):
            raise Unable(f"scales of {scale.shape} for {x.shape} are not known here")
        return np.expand_dims(scale, tuple(range(1, x.ndim - axis % x.ndim)))

    return shaped
