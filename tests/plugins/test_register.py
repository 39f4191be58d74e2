"""register.cpp, the library that a server only opens: it registers the plugins beside it with the TensorRT there.

Processes of their own open it as Triton does, with dlopen and nothing else.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from native import compiled, emulated_library
from plugin_cases import CASES, plugins

from llmexport.plugins import library

HERE = Path(__file__).parent
LEAN = [p for p in os.environ.get("TENSORRT_LEAN_PATH", "").split(os.pathsep) if p]  # as in test_tensorrt.py
# Opens the libraries of argv[2:] one after the other, then loads as we do what lies beside the first; prints the
# plugins that there are before and after each.
OPEN = """
import ctypes, importlib, json, sys
from pathlib import Path
from llmexport.plugins import library
trt = importlib.import_module(sys.argv[1])
def ours():
    return sorted(c.name for c in trt.get_plugin_registry().all_creators if c.plugin_namespace == library.NAMESPACE)
found = [ours()]
for path in sys.argv[2:]:
    ctypes.CDLL(path)
    found.append(ours())
found.append(sorted(library.load(trt, Path(sys.argv[2]).with_name(library.FILE))))
print(json.dumps(found))
"""
# Builds an engine of one op without a call of ours that loads plugins.
BUILD = """
import ctypes, json, sys
sys.path.insert(0, sys.argv.pop(1))
import one_node_build
from llmexport.plugins import library
ctypes.CDLL(sys.argv.pop(1))
one_node_build.library = type("Opened", (), {"load": staticmethod(lambda *_: None), "served": library.served})
path, name, attributes, dtype = sys.argv[1:]
one_node_build.build(path, name, json.loads(attributes), dtype)
"""
rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="pip install tensorrt-rtx")


@pytest.fixture(scope="module")
def register() -> Path:
    """The library, beside the plugins, whose kernels are the emulator's."""
    path = compiled("llmexport_register")
    assert path.with_name(library.FILE) == emulated_library()
    return path


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", *map(str, command)], env={**os.environ, **environment}, capture_output=True, text=True
    )


def check_registers(module: str, register: Path, tmp_path: Path, **environment: str) -> None:
    other = tmp_path / register.name
    for name in (register.name, library.FILE):
        shutil.copy(register.with_name(name), tmp_path / name)
    done = run(OPEN, module, register, register, other, **environment)
    assert done.returncode == 0, done.stderr[-2000:]
    none, *others = json.loads(done.stdout.splitlines()[-1])
    assert none == []
    # At once, again, by another library, and by load() as we call it.
    assert others == [sorted(plugins())] * 4
    [line] = [text for text in done.stderr.splitlines() if text.startswith("llmexport:")]
    assert line.endswith(f"does not take the plugins of {other.with_name(library.FILE)}: are they registered?")


@rtx
def test_rtx_has_all_plugins_once_it_is_opened(register: Path, tmp_path: Path) -> None:
    check_registers("tensorrt_rtx", register, tmp_path)


@pytest.mark.skipif(not LEAN, reason="TENSORRT_LEAN_PATH is unset: pip install --target it tensorrt-lean-cu13")
@pytest.mark.parametrize("folder", LEAN)
def test_tensorrt_10_and_11_have_all_plugins_once_it_is_opened(folder: str, register: Path, tmp_path: Path) -> None:
    check_registers("tensorrt_lean", register, tmp_path, PYTHONPATH=folder)


@rtx
def test_the_parser_then_makes_plugin_layers(register: Path) -> None:
    attributes = {n: int(v) if isinstance(v, bool) else v for n, v in CASES["Rope"].attributes.items()}
    arguments = (register.with_name(library.FILE), "Rope", json.dumps(attributes), "fp16")
    done = run(BUILD, HERE, register, *arguments, **library.builder_environment("tensorrt_rtx"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["layers"] == ["PLUGIN_V3"]


def test_without_a_tensorrt_it_registers_nothing_and_says_so(register: Path) -> None:
    done = run("import ctypes, sys; ctypes.CDLL(sys.argv[1]); print('opened')", register)
    assert (done.returncode, done.stdout) == (0, "opened\n")
    said = f"llmexport: no plugin of {register.with_name(library.FILE)} is registered, as no TensorRT is loaded"
    assert done.stderr == f"{said}: load it before this library\n"


def test_it_needs_no_tensorrt_and_no_cuda(register: Path) -> None:
    needed = subprocess.run(["readelf", "-d", register], capture_output=True, text=True, check=True).stdout
    names = [line.split("[")[1].rstrip("]") for line in needed.splitlines() if "(NEEDED)" in line]
    assert [n for n in names if n.partition(".")[0] not in ("libstdc++", "libgcc_s", "libc", "libdl", "libm")] == []
