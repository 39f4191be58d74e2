"""The nvcc-built library in the TensorRT flavours that PyPI has: loaded, created from, parsed and built with."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from native import emulated_library
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
versions = json.loads(sys.argv[3])
for op, attributes in json.loads(sys.argv[2]).items():
    fields = []
    for name, value in attributes.items():
        if isinstance(value, str):
            fields.append(trt.PluginField(name, value.encode() + b"\\0", trt.PluginFieldType.CHAR))
        else:
            dtype, kind = kinds[type(value)]
            fields.append(trt.PluginField(name, np.array([value], dtype), kind))
    version = versions[op]
    creator = trt.get_plugin_registry().get_creator(op, version, "llmexport")
    for phase in (trt.TensorRTPhase.BUILD, trt.TensorRTPhase.RUNTIME):
        plugin = creator.create_plugin(op, trt.PluginFieldCollection(fields), phase)
        core = plugin.get_capability_interface(trt.PluginCapabilityType.CORE)
        assert (core.plugin_name, core.plugin_version, core.plugin_namespace) == (op, version, "llmexport")
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
    versions = {name: str(OPS[name].version) for name in attributes}
    command = [sys.executable, "-c", CREATE, str(cuda_library), json.dumps(attributes), json.dumps(versions)]
    done = run(command, PYTHONPATH=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    said = sorted({tuple(line.split()) for line in done.stdout.splitlines()})
    assert said == sorted((name, str(len(OPS[name].outputs))) for name in served())


def built(
    folder: Path, library_path: Path, attributes: dict[str, dict[str, object]], *dtypes: str
) -> dict[str, dict[str, int]]:
    """The exit code of the build of each case, of these attributes, in each dtype; what it says lies in the folder."""
    program = [sys.executable, str(HERE / "one_node_build.py"), str(folder), str(library_path)]
    done = run([*program, json.dumps(attributes), *dtypes], **library.builder_environment("tensorrt_rtx"))
    assert done.returncode == 0, done.stderr[-2000:]
    codes: dict[str, dict[str, int]] = json.loads(done.stdout)
    return codes


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="pip install tensorrt-rtx")
@pytest.mark.parametrize("op", sorted(served()))
def test_rtx_builds_a_plugin_layer(op: str, cuda_library: Path, tmp_path: Path) -> None:
    """From an ONNX node of domain llmexport, with no TensorRT variable set by the user."""
    cases = {name: case for name, case in CASES.items() if case.op == op}
    codes = built(tmp_path, cuda_library, {n: numbers(c) for n, c in cases.items()}, "fp32", "fp16", "bf16")
    assert codes.keys() == cases.keys()
    for name, dtype in [(n, d) for n, of_it in codes.items() for d in of_it]:
        said = (tmp_path / f"{name}.{dtype}.err").read_text()
        if dtype not in cases[name].dtypes:
            assert codes[name][dtype] != 0, name
            assert f"llmexport: {op}: " in said, name
            continue
        assert codes[name][dtype] == 0, f"{name} in {dtype}: {said[-2000:]}"
        assert "Unused Input" not in said, name
        plan = json.loads((tmp_path / f"{name}.{dtype}.out").read_text().splitlines()[-1])
        assert plan["layers"] == ["PLUGIN_V3"], name
        assert plan["bytes"] > 0, name


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="pip install tensorrt-rtx")
def test_rtx_reports_what_a_plugin_refuses(cuda_library: Path, tmp_path: Path) -> None:
    assert built(tmp_path, cuda_library, {"Rope": {"interleaved": 2}}, "fp16")["Rope"]["fp16"] != 0
    assert "llmexport: Rope: interleaved is 2, not 0 or 1" in (tmp_path / "Rope.fp16.err").read_text()


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="pip install tensorrt-rtx")
def test_rtx_finds_no_plugin_of_an_earlier_version(tmp_path: Path) -> None:
    """As `trtexec` would not, given a file of target tensorrt from before an op came to mean something else."""
    earlier = {**numbers(CASES["SinkAttention"]), "plugin_version": "1"}
    assert built(tmp_path, emulated_library(), {"SinkAttention": earlier}, "fp16")["SinkAttention"]["fp16"] != 0
    assert "Plugin not found" in (tmp_path / "SinkAttention.fp16.err").read_text()


def test_builder_environment_is_ours_where_rtx_needs_no_help() -> None:
    assert library.builder_environment("tensorrt") == dict(os.environ)
