"""The types of tensors and what each is called: by numpy and torch, safetensors, ONNX and TensorRT. The one table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Dtype:
    """A type of `bits` a number; `name` is that of torch, numpy and ml_dtypes, and the one used here.

    `safetensors` is its name in a file's header, `onnx` its number in TensorProto.DataType, `tensorrt` its name in
    DataType, `triton` its name in the model configuration of Triton Inference Server; "" where it has none.
    """

    name: str
    bits: int
    safetensors: str
    onnx: int
    tensorrt: str
    triton: str = ""


BY_NAME: Mapping[str, Dtype] = MappingProxyType(
    {
        d.name: d
        for d in (
            Dtype("int4", 4, "", 22, "INT4"),
            Dtype("uint4", 4, "", 21, ""),
            Dtype("float4_e2m1fn", 4, "F4", 23, "FP4"),
            Dtype("bool", 8, "BOOL", 9, "BOOL", "TYPE_BOOL"),
            Dtype("uint8", 8, "U8", 2, "UINT8", "TYPE_UINT8"),
            Dtype("int8", 8, "I8", 3, "INT8", "TYPE_INT8"),
            Dtype("float8_e4m3fn", 8, "F8_E4M3", 17, "FP8"),
            Dtype("float8_e5m2", 8, "F8_E5M2", 19, ""),
            Dtype("float8_e8m0fnu", 8, "F8_E8M0", 24, "E8M0"),
            Dtype("uint16", 16, "U16", 4, "", "TYPE_UINT16"),
            Dtype("int16", 16, "I16", 5, "", "TYPE_INT16"),
            Dtype("float16", 16, "F16", 10, "HALF", "TYPE_FP16"),
            Dtype("bfloat16", 16, "BF16", 16, "BF16", "TYPE_BF16"),
            Dtype("uint32", 32, "U32", 12, "", "TYPE_UINT32"),
            Dtype("int32", 32, "I32", 6, "INT32", "TYPE_INT32"),
            Dtype("float32", 32, "F32", 1, "FLOAT", "TYPE_FP32"),
            Dtype("uint64", 64, "U64", 13, "", "TYPE_UINT64"),
            Dtype("int64", 64, "I64", 7, "INT64", "TYPE_INT64"),
            Dtype("float64", 64, "F64", 11, "", "TYPE_FP64"),
            Dtype("complex64", 64, "C64", 14, ""),
        )
    }
)
BY_SAFETENSORS: Mapping[str, Dtype] = MappingProxyType({d.safetensors: d for d in BY_NAME.values() if d.safetensors})
BY_ONNX: Mapping[int, Dtype] = MappingProxyType({d.onnx: d for d in BY_NAME.values()})
BY_TENSORRT: Mapping[str, Dtype] = MappingProxyType({d.tensorrt: d for d in BY_NAME.values() if d.tensorrt})
# The numbers of TensorRT's DataType.
TENSORRT_NUMBERS: Mapping[str, int] = MappingProxyType(
    {
        name: number
        for number, name in enumerate(
            ("FLOAT", "HALF", "INT8", "INT32", "BOOL", "UINT8", "FP8", "BF16", "INT64", "INT4", "FP4", "E8M0")
        )
    }
)
# The types that models are exported in, and that ops compute with.
FLOATS = ("float32", "float16", "bfloat16")
