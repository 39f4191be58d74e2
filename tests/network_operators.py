"""Operators of ONNX, with the layers that TensorRT's parser makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from onnx import TensorProto

Arrays = Mapping[str, np.ndarray]
RANDOM = np.random.default_rng(0)


def floats(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(dtype)


def ints(most: int, *shape: int) -> np.ndarray:
    return RANDOM.integers(0, most, shape)


X, Y = floats(2, 3, 4), floats(2, 3, 4)
SIGNED = np.array([[7, -7, 7, -7, 6]])
DIVISORS = np.array([[2, 2, -2, -2, 3]])
BOOLS = X > 0
HEADS = {"q": floats(2, 4, 3, 8), "k": floats(2, 2, 5, 8), "v": floats(2, 2, 5, 8)}
SEEN = np.tril(np.ones((2, 1, 3, 5), bool), 2)
IMAGE = {"a": floats(2, 4, 9, 8), "w": floats(6, 2, 3, 2), "b": floats(6)}
TWICE = {"": np.zeros(0, np.float32), "by": np.array([1, 1, 2, 1.5], np.float32)}

OF_TWO = ("Add", "Sub", "Mul", "Div", "Max", "Min", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
OF_ONE = ("Exp", "Abs", "Neg", "Sin", "Cos", "Tan", "Sinh", "Cosh", "Atan", "Asinh", "Ceil", "Floor", "Round", "Sign")
OF_ONE += ("Erf", "Reciprocal", "IsNaN", "Relu", "Sigmoid", "Tanh", "Softsign", "Softplus", "Elu", "Mish", "Celu")
OF_ONE += ("HardSwish",)


def _turned() -> Iterator[tuple[str, Arrays, Arrays, dict[str, Any]]]:
    for size in (4, 8):
        for interleaved in (0, 1):
            feed = {"a": floats(2, 4, 3, 8), "c": floats(9, size // 2), "s": floats(9, size // 2), "i": ints(9, 2, 3)}
            yield "RotaryEmbedding", feed, {}, {"interleaved": interleaved, "rotary_embedding_dim": size % 8}


# (operator, inputs, what the model holds, attributes)
OPERATORS: list[tuple[str, Arrays, Arrays, dict[str, Any]]] = [
    *((n, {"a": X, "b": Y}, {}, {}) for n in OF_TWO),
    *(
        (n, {"a": SIGNED, "b": DIVISORS}, {}, {})
        for n in ("Div", "Mul", "Mod", "Sub", "Less", "GreaterOrEqual", "Equal")
    ),
    # Of each patch its picture: by where the pictures end, and by the sums so far.
    ("CumSum", {"a": ints(9, 5)}, {"axis": np.array(0)}, {}),
    ("ReduceSum", {"a": ints(9, 5, 3)}, {"axes": np.array([1])}, {"keepdims": 0}),
    ("Gather", {"a": ints(9, 5), "i": ints(5, 7)}, {}, {"axis": 0}),
    # A step whose tokens stand for no picture.
    ("Concat", {"a": floats(1, 4), "b": floats(0, 4)}, {}, {"axis": 0}),
    *((n, {"a": BOOLS, "b": Y > 0}, {}, {}) for n in ("And", "Or", "Xor")),
    ("Pow", {"a": np.abs(X), "b": Y}, {}, {}),
    *((n, {"a": X}, {}, {}) for n in OF_ONE),
    *((n, {"a": np.abs(X) / 9 + 1}, {}, {}) for n in ("Log", "Sqrt", "Acosh")),
    *((n, {"a": X / 9}, {}, {}) for n in ("Asin", "Acos", "Atanh")),
    ("IsInf", {"a": np.array([[1, np.inf, -np.inf]], np.float32)}, {}, {}),
    ("Selu", {"a": X}, {}, {"alpha": 1.5, "gamma": 1.1}),
    ("LeakyRelu", {"a": X}, {}, {"alpha": 0.3}),
    ("HardSigmoid", {"a": X}, {}, {"alpha": 0.3, "beta": 0.4}),
    ("ThresholdedRelu", {"a": X}, {}, {"alpha": 0.3}),
    ("Swish", {"a": X}, {}, {"alpha": 1.7}),
    *(("Gelu", {"a": X}, {}, {"approximate": how}) for how in ("none", "tanh")),
    ("Clip", {"a": X}, {"low": np.float32(-0.5), "high": np.float32(0.25)}, {}),
    ("Not", {"a": BOOLS}, {}, {}),
    ("Where", {"c": BOOLS, "a": X, "b": Y}, {}, {}),
    *((f"Reduce{n}", {"a": X}, {"axes": np.array([0, 2])}, {}) for n in ("Sum", "Mean", "Max", "Prod")),
    ("ReduceSum", {"a": X}, {"axes": np.array([1])}, {"keepdims": 0}),
    ("ReduceMin", {"a": ints(9, 2, 3)}, {"axes": np.array([-1])}, {}),
    ("Softmax", {"a": X}, {}, {"axis": 1}),
    *(("CumSum", {"a": X}, {"axis": np.array(1)}, {"exclusive": e, "reverse": r}) for e in (0, 1) for r in (0, 1)),
    ("MatMul", {"a": floats(2, 1, 3, 4), "b": floats(1, 5, 4, 2)}, {}, {}),
    ("Gemm", {"a": floats(3, 4)}, {"b": floats(5, 4), "c": floats(5)}, {"transB": 1, "alpha": 0.5}),
    ("Einsum", {"a": X, "b": floats(2, 5, 4)}, {}, {"equation": "bij,bkj->bik"}),
    ("Transpose", {"a": X}, {}, {"perm": [2, 0, 1]}),
    ("Reshape", {"a": X}, {"to": np.array([0, -1, 2])}, {}),
    ("Flatten", {"a": X}, {}, {"axis": 2}),
    ("Squeeze", {"a": floats(2, 1, 4)}, {"axes": np.array([1])}, {}),
    ("Unsqueeze", {"a": X}, {"axes": np.array([0, -1])}, {}),
    ("Expand", {"a": floats(2, 1, 4)}, {"to": np.array([5, 2, 3, 4])}, {}),
    ("Tile", {"a": X}, {"times": np.array([1, 2, 3])}, {}),
    ("Concat", {"a": X, "b": Y}, {}, {"axis": -1}),
    ("Shape", {"a": X}, {}, {}),
    ("Cast", {"a": 9 * X}, {}, {"to": TensorProto.INT32}),
    ("Gather", {"a": X, "i": ints(3, 2, 2)}, {}, {"axis": 1}),
    ("GatherElements", {"a": X, "i": ints(3, 2, 2, 4)}, {}, {"axis": 1}),
    ("GatherND", {"a": X, "i": ints(3, 2, 5, 1)}, {}, {"batch_dims": 1}),
    ("GatherND", {"a": X, "i": ints(2, 5, 2)}, {}, {}),
    ("ScatterElements", {"a": X, "i": np.array([[[2, 0, 1, 1]]]), "u": floats(1, 1, 4)}, {}, {"axis": 1}),
    ("ScatterND", {"a": X, "i": np.array([[1, 2], [0, 1]]), "u": floats(2, 4)}, {}, {}),
    (
        "Slice",
        {"a": floats(2, 9, 4)},
        {"from": np.array([8, 1]), "to": np.array([-20, 3]), "axes": np.array([1, 2]), "by": np.array([-3, 1])},
        {},
    ),
    ("Slice", {"a": X}, {"from": np.array([1]), "to": np.array([1]), "axes": np.array([1])}, {}),
    ("Pad", {"a": X}, {"by": np.array([0, 1, 2, 0, 3, 1]), "with": np.float32(0.5)}, {}),
    *(("Pad", {"a": X}, {"by": np.array([0, 1, 2, 0, 2, 1])}, {"mode": m}) for m in ("reflect", "edge")),
    ("Range", {}, {"from": np.array(3), "to": np.array(11), "by": np.array(2)}, {}),
    ("ConstantOfShape", {}, {"shape": np.array([2, 3])}, {}),
    ("Trilu", {"a": X}, {"k": np.array(1)}, {"upper": 1}),
    *(("TopK", {"a": X}, {"k": np.array([2])}, {"axis": -1, "largest": n}) for n in (0, 1)),
    ("ArgMax", {"a": X}, {}, {"axis": 1}),
    ("LayerNormalization", {"a": X, "w": floats(4), "b": floats(4)}, {}, {"epsilon": 0.1}),
    ("LayerNormalization", {"a": X, "w": floats(3, 4)}, {}, {"axis": 1}),
    ("RMSNormalization", {"a": X, "w": floats(4)}, {}, {"epsilon": 0.1}),
    ("InstanceNormalization", {"a": X, "w": floats(3), "b": floats(3)}, {}, {"epsilon": 0.1}),
    *_turned(),
    ("RotaryEmbedding", {"a": floats(2, 4, 3, 8), "c": floats(2, 3, 4), "s": floats(2, 3, 4)}, {}, {}),
    ("Attention", HEADS, {}, {"scale": 0.3}),
    ("Attention", dict(zip("qkv", floats(3, 2, 4, 5, 8), strict=True)), {}, {"scale": 0.3}),
    ("Attention", HEADS, {}, {"is_causal": 1}),
    ("Attention", {**HEADS, "m": SEEN}, {}, {}),
    ("Attention", {**HEADS, "m": floats(2, 1, 3, 5)}, {}, {}),
    ("Conv", {"a": floats(2, 6, 9)}, {"w": floats(6, 1, 4)}, {"group": 6, "pads": [3, 0]}),
    ("Conv", {"a": floats(5, 3, 2, 4, 4)}, {"w": floats(6, 3, 2, 4, 4), "b": floats(6)}, {"strides": [2, 4, 4]}),
    ("Conv", {"a": floats(2, 3, 8, 12)}, {"w": floats(6, 3, 4, 4)}, {"strides": [4, 4]}),
    ("Conv", IMAGE, {}, {"group": 2, "strides": [2, 1], "dilations": [1, 2], "pads": [1, 0, 2, 1]}),
    *(
        ("Resize", {"a": floats(1, 2, 4, 6)}, TWICE, {"mode": m, "coordinate_transformation_mode": c})
        for m in ("nearest", "linear")
        for c in ("half_pixel", "asymmetric", "align_corners")
    ),
    ("TensorScatter", {"a": floats(2, 3, 8, 4), "u": floats(2, 3, 2, 4), "i": np.array([5, 0])}, {}, {"axis": -2}),
    ("DequantizeLinear", {"a": ints(256, 2, 3).astype(np.int8), "s": np.abs(floats(3))}, {}, {"axis": 1}),
    ("QuantizeLinear", {"a": 40 * X, "s": np.abs(floats(3)) / 3}, {"z": np.zeros(3, np.int8)}, {"axis": 1}),
]
