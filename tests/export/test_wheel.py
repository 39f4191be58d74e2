"""A wheel as a release makes it: whole, and with traces that spare a first export torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHILD = """
import sys
from llmexport.export.cli.main import main
try:
    main()
finally:
    print(sys.modules["llmexport.export"].__file__, "torch" in sys.modules)
"""


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """Of these sources, with traces of a tiny Gemma."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("export", "graphs", "validate", "plugins", "run"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "traces.zip"))
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, source / name)
    ship = [sys.executable, str(ROOT / "tests/ship_traces.py"), "-o", str(source / "export/traces.zip"), "tiny gemma"]
    subprocess.run(ship, check=True, capture_output=True)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(source)]
    subprocess.run(pip, check=True, capture_output=True)
    [made] = tmp_path.glob("*.whl")
    return made


@pytest.fixture
def python(wheel: Path, tmp_path: Path) -> Path:
    """Of an environment that has the wheel, and all else from this one."""
    folder = tmp_path / "own"
    venv.create(folder, with_pip=False, symlinks=True)
    [packages] = folder.glob("lib/*/site-packages")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(packages)
    # Of a folder that is only named none of its own .pth files is read, nor found what is installed to be edited.
    (packages / "shared.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin" / "python"


@pytest.mark.slow
def test_a_wheel_is_whole_and_its_first_export_needs_no_torch(python: Path, wheel: Path, tmp_path: Path) -> None:
    # What builds the plugin library.
    sources = [p for p in (ROOT / "plugins").rglob("*") if p.suffix in {".cu", ".cuh", ".h", ".cpp", ".txt", ".map"}]
    named = set(zipfile.ZipFile(wheel).namelist())
    assert {f"llmexport/plugins/{p.relative_to(ROOT / 'plugins')}" for p in sources} <= named
    subprocess.run(["llmexport", "checkpoint", "--arch=gemma", "-q", "-o", tmp_path / "in"], check=True)
    command = [python, "-c", CHILD, "onnx", "-q", f"--checkpoint={tmp_path / 'in'}", "-o", tmp_path / "out"]
    own = {**os.environ, "LLMEXPORT_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, env=own, cwd=tmp_path, capture_output=True, text=True, check=True)
    path, torch = done.stdout.split()
    assert Path(path).is_relative_to(python.parents[1])
    assert torch == "False"
