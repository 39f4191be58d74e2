"""The nvcc-built library in the TensorRT flavours that PyPI has: loaded, created from, parsed and built with."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from plugin_cases import CASES, OPS, Case, served

from llmexport.plugins import library

HERE = Path(__file__).parent
# Folders made by `pip install --target FOLDER tensorrt-lean-cu13==VERSION`, separated by `:`.
LEAN = [p for p in os.environ.get("TENSORRT_LEAN_PATH", "").split(os.pathsep) if p]
# Two calls of load(), then every creator, as TensorRT sees it.
CREATE = """
import json, sys
import numpy as np
import tensorrt_lean as trt
from pathlib import Path
from llmexport.plugins import library
logger = trt.Logger(trt.Logger.WARNING)
ops = library.load(trt, Path(sys.argv[1])) & library.load(trt, Path(sys.argv[1]))
kinds = {int: (np.int32, trt.PluginFieldType.INT32), float: (np.float32, trt.PluginFieldType.FLOAT32)}
for op, attributes in json.loads(sys.argv[2]).items():
    fields = []
    for name, value in attributes.items():
        if isinstance(value, str):
            fields.append(trt.PluginField(name, value.encode() + b"\\0", trt.PluginFieldType.CHAR))
        else:
            dtype, kind = kinds[type(value)]
            fields.append(trt.PluginField(name, np.array([value], dtype), kind))
    creator = trt.get_plugin_registry().get_creator(op, "1", "llmexport")
    for phase in (trt.TensorRTPhase.BUILD, trt.TensorRTPhase.RUNTIME):
        plugin = creator.create_plugin(op, trt.PluginFieldCollection(fields), phase)
        core = plugin.get_capability_interface(trt.PluginCapabilityType.CORE)
        assert (core.plugin_name, core.plugin_version, core.plugin_namespace) == (op, "1", "llmexport")
        build = plugin.get_capability_interface(trt.PluginCapabilityType.BUILD)
        print(op, build.num_outputs)
"""


def numbers(case: Case) -> dict[str, object]:
    """The attributes as ONNX has them: a bool is an int."""
    return {n: int(v) if isinstance(v, bool) else v for n, v in case.attributes.items()}


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.mark.skipif(not LEAN, reason="TENSORRT_LEAN_PATH is unset: pip install --target it tensorrt-lean-cu13")
@pytest.mark.parametrize("folder", LEAN)
def test_lean_creates_every_plugin(folder: str, cuda_library: Path) -> None:
    attributes = {case.op: numbers(case) for case in CASES.values()}
    command = [sys.executable, "-c", CREATE, str(cuda_library), json.dumps(attributes)]
    done = run(command, PYTHONPATH=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    said = sorted({tuple(line.split()) for line in done.stdout.splitlines()})
    assert said == sorted((name, str(len(OPS[name].outputs))) for name in served())


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="pip install tensorrt-rtx")
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_rtx_builds_a_plugin_layer(name: str, dtype: str, cuda_library: Path) -> None:
    """From an ONNX node of domain llmexport, with no TensorRT variable set by the user."""
    program = [sys.executable, str(HERE / "one_node_build.py")]
    command = [*program, str(cuda_library), name, dtype, json.dumps(numbers(CASES[name]))]
    done = run(command, **library.builder_environment("tensorrt_rtx"))
    if dtype not in CASES[name].dtypes:
        assert done.returncode != 0
        assert f"llmexport: {CASES[name].op}: " in done.stderr
        return
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Unused Input" not in done.stderr
    built = json.loads(done.stdout.splitlines()[-1])
    assert built["layers"] == ["PLUGIN_V3"]
    assert built["bytes"] > 0


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="pip install tensorrt-rtx")
def test_rtx_reports_what_a_plugin_refuses(cuda_library: Path) -> None:
    program = [sys.executable, str(HERE / "one_node_build.py")]
    command = [*program, str(cuda_library), "Rope", "fp16", json.dumps({"interleaved": 2})]
    done = run(command, **library.builder_environment("tensorrt_rtx"))
    assert done.returncode != 0
    assert "llmexport: Rope: interleaved is 2, not 0 or 1" in done.stderr


def test_builder_environment_is_ours_where_rtx_needs_no_help() -> None:
    assert library.builder_environment("tensorrt") == dict(os.environ)
