"""A layer as a function from arrays to arrays, rounded as TensorRT types them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from llmexport.export.network import computing, moving, neural, plugin, pointwise
from llmexport.export.network.kinds import Array, Compute, Unable, numpy_type

# A tensor of the model's file: of the constant that a layer is, or the so many-th input of its node.
Stored = Callable[[str, int | None], Array]
NARROW = (np.float16, ml_dtypes.bfloat16)
# What keeps the numbers that it is given.
MOVING: Mapping[str, Callable[[Any], Compute]] = MappingProxyType(
    {
        "ASSERTION": moving.assertion,
        "ATTENTION_OUTPUT": moving.identity,
        "CAST": moving.cast,
        "CONCATENATION": moving.concatenation,
        "CONDITIONAL_INPUT": moving.identity,
        "FILL": moving.fill,
        "GATHER": moving.gather,
        "IDENTITY": moving.cast,
        "KV_CACHE_UPDATE": moving.kv_cache_update,
        "SCATTER": moving.scatter,
        "SELECT": moving.select,
        "SHAPE": moving.shape,
        "SHUFFLE": moving.shuffle,
        "SLICE": moving.slice_,
        "SQUEEZE": moving.squeeze,
        "UNSQUEEZE": moving.unsqueeze,
    }
)
COMPUTING: Mapping[str, Callable[[Any], Compute]] = MappingProxyType(
    {
        "ACTIVATION": pointwise.activation,
        "ATTENTION_INPUT": neural.attention,
        "CUMULATIVE": computing.cumulative,
        "DEQUANTIZE": pointwise.dequantize,
        "EINSUM": computing.einsum,
        "ELEMENTWISE": pointwise.elementwise,
        "MATRIX_MULTIPLY": computing.matrix_multiply,
        "NORMALIZATION": computing.normalization,
        "QUANTIZE": pointwise.quantize,
        "REDUCE": computing.reduce,
        "RESIZE": neural.resize,
        "ROTARY_EMBEDDING": neural.rotary_embedding,
        "SOFTMAX": computing.softmax,
        "TOPK": computing.top_k,
        "UNARY": pointwise.unary,
    }
)


@dataclass(frozen=True)
class Layer:
    """A layer of a network by what it reads and makes, tensors by name; "" where an input is left out.

    shapes: of its outputs as TensorRT infers them, -1 where it does not know.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dtypes: tuple[np.dtype[Any], ...]
    shapes: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        return f"layer {self.name} ({self.kind})"


def of(trt: Any, layer: Any) -> Layer:
    """The layer, which then has the class of its kind, with the attributes of that. Raises Unable on its types."""
    kind = layer.type.name
    if found := _classes(trt).get(kind.replace("_", "")):
        layer.__class__ = found
    inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
    outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
    return Layer(
        layer.name,
        kind,
        tuple(t.name if t else "" for t in inputs),
        tuple(t.name for t in outputs),
        tuple(numpy_type(t.dtype) for t in outputs),
        tuple(tuple(t.shape) for t in outputs),
    )


@functools.cache
def _classes(trt: Any) -> dict[str, Any]:
    names = (n for n in dir(trt) if n.startswith("I") and n.endswith("Layer"))
    return {n.removeprefix("IIf").removeprefix("I").removesuffix("Layer").upper(): getattr(trt, n) for n in names}


def function(trt: Any, layer: Layer, raw: Any, stored: Stored) -> Compute:
    """What the layer makes of arrays: a tuple of its outputs. Raises Unable on what is not known of it."""
    exact = True
    if layer.kind == "CONSTANT":
        constant = _weights(raw.weights, raw.name, None, stored).reshape(layer.shapes[0])
        return lambda: (constant,)
    if layer.kind == "CONVOLUTION":
        held = (_weights(x, raw.name, place, stored) for place, x in ((1, raw.kernel), (2, raw.bias)))
        compute, exact = neural.convolution(raw, *(w if w.size else None for w in held)), False
    elif layer.kind == "PLUGIN_V3":
        compute = plugin.reference(trt, raw)
    elif layer.kind in MOVING:
        compute = MOVING[layer.kind](raw)
    elif layer.kind in COMPUTING:
        compute, exact = COMPUTING[layer.kind](raw), False
    else:
        raise Unable("layers of this kind are not known here")
    return _checked(layer, compute if exact else _in_float32(compute))


def _in_float32(compute: Compute) -> Compute:
    def wide(*given: Array | None) -> Any:
        return compute(*(x.astype(np.float32) if x is not None and x.dtype in NARROW else x for x in given))

    return wide


def _checked(layer: Layer, compute: Compute) -> Compute:
    """Outputs of the layer's types, and of the shapes that TensorRT infers. Raises Unable on other shapes."""

    def run(*given: Array | None) -> tuple[Array, ...]:
        try:
            made = compute(*given)
        except Exception as error:
            shapes = [None if x is None else x.shape for x in given]
            raise Unable(f"{layer} of {shapes}: {error}") from error
        made = made if isinstance(made, tuple) else (made,)
        for value, shape in zip(made, layer.shapes, strict=True):
            if len(value.shape) != len(shape) or any(n not in (m, -1) for m, n in zip(value.shape, shape, strict=True)):
                raise Unable(f"{layer} makes {value.shape}, TensorRT infers {shape}")
        return tuple(v.astype(t, copy=False) for v, t in zip(made, layer.dtypes, strict=True))

    return run


def _weights(found: Any, name: str, place: int | None, stored: Stored) -> Array:
    """As TensorRT holds them; of types that its Python has no arrays of, as the model's file does."""
    if isinstance(found, np.ndarray) or not found.size:
        return np.asarray(found if found.size else ())
    values = stored(name, place)
    if values.size != found.size:
        raise Unable(f"{found.size} weights are {values.size} in the model's file")
    return values
