"""The table of types says what torch, ml_dtypes, safetensors, ONNX and TensorRT say."""

import importlib.util
import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import onnx
import pytest
import safetensors.torch
import torch

from llmexport.plugins.dtypes import BY_NAME, BY_TENSORRT, FLOATS, TENSORRT_NUMBERS, Dtype
from llmexport.plugins.library import builder_environment

each = pytest.mark.parametrize("dtype", BY_NAME.values(), ids=lambda d: d.name)
whole_bytes = pytest.mark.parametrize("dtype", [d for d in BY_NAME.values() if d.bits % 8 == 0], ids=lambda d: d.name)


@each
def test_onnx_knows_the_number_by_that_name(dtype: Dtype):
    spelled = {"float32": "FLOAT", "float64": "DOUBLE", "float8_e8m0fnu": "FLOAT8E8M0", "float4_e2m1fn": "FLOAT4E2M1"}
    name = onnx.TensorProto.DataType.Name(dtype.onnx)
    assert name == spelled.get(dtype.name, dtype.name.replace("_", "").upper())


@each
def test_onnx_reads_the_number_as_that_type(dtype: Dtype):
    assert onnx.helper.tensor_dtype_to_np_dtype(dtype.onnx) == np.dtype(getattr(ml_dtypes, dtype.name, dtype.name))


@whole_bytes
def test_safetensors_writes_that_name_and_torch_takes_that_many_bits(dtype: Dtype):
    made = torch.zeros(3, dtype=getattr(torch, dtype.name))
    data = safetensors.torch.save({"a": made})
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert (header["a"]["dtype"], header["a"]["data_offsets"]) == (dtype.safetensors, [0, 3 * dtype.bits // 8])


def test_types_of_half_a_byte_have_four_bits():
    small = [n for n, d in BY_NAME.items() if d.bits % 8]
    assert {n: ml_dtypes.finfo(n).bits if n.startswith("float") else ml_dtypes.iinfo(n).bits for n in small} == {
        n: BY_NAME[n].bits for n in small
    }


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="pip install tensorrt-rtx")
def test_tensorrt_has_those_names_and_takes_that_many_bits():
    code = "import json, tensorrt_rtx as t\n" + (
        "print(json.dumps({n: (d.itemsize, int(d)) for n, d in t.DataType.__members__.items()}))"
    )
    environment = builder_environment("tensorrt_rtx")
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    # Its bindings know no size of E8M0, the type of scales.
    sizes = {n: size for n, (size, _) in json.loads(run.stdout).items()}
    found = {n: sizes[n] and 8 * sizes[n] for n in BY_TENSORRT}
    assert found == {n: None if n == "E8M0" else d.bits for n, d in BY_TENSORRT.items()}
    assert {n: number for n, (_, number) in json.loads(run.stdout).items()} == TENSORRT_NUMBERS


def test_models_are_exported_in_types_that_all_have():
    assert all(d.safetensors and d.onnx and d.tensorrt for d in map(BY_NAME.__getitem__, FLOATS))


def test_no_two_types_share_a_name_or_a_number():
    for names in zip(*((d.name, d.safetensors, d.onnx, d.tensorrt) for d in BY_NAME.values()), strict=True):
        said = [n for n in names if n]
        assert len(said) == len(set(said))
