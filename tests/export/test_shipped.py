"""Traces that a wheel brings along: found where nothing was traced, and used only if they are those of this source."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llmexport.export import cache, shipped

CHILD = """
import sys
from pathlib import Path
from llmexport.export import shipped
shipped.FILE = Path(sys.argv.pop(1))
from llmexport.export.cli.main import main
try:
    main()
finally:
    print("torch" in sys.modules)
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMEXPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shipped, "FILE", tmp_path / "traces.zip")
    write(shipped.FILE, cache.source_digest())
    return shipped.FILE


def write(path: Path, sources: str) -> None:
    traces = {("block", "a"): b"A" * 1000, ("block", "b"): b"B", ("body", "a"): b"", ("body", "c"): b"C"}
    named = {shipped.name_of(kind, [key]): data for (kind, key), data in traces.items()}
    first = dict([*named.items()][:3])
    shipped.write(path, {"one": first, "two": {n: d for n, d in named.items() if n not in first}}, sources)
    shipped._index.cache_clear()


def asked(kind: str = "block", key: str = "a") -> bytes:
    return cache.cached(kind, [key], lambda: b"made")


@pytest.mark.parametrize(
    ("kind", "key", "expected"),
    [("block", "a", b"A" * 1000), ("block", "b", b"B"), ("body", "c", b"C"), ("body", "b", b"made")],
)
def test_what_it_has_is_not_made(file: Path, kind: str, key: str, expected: bytes) -> None:
    assert asked(kind, key) == expected


def test_it_is_kept_as_what_was_made_here_is(file: Path) -> None:
    asked()
    file.unlink()
    shipped._index.cache_clear()
    assert asked() == b"A" * 1000


def test_it_is_used_where_the_cache_cannot_be(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMEXPORT_CACHE", "/dev/null/none")
    assert asked() == b"A" * 1000


def test_traces_of_other_source_are_not_used(file: Path) -> None:
    write(file, "another")
    assert asked() == b"made"


def test_a_damaged_file_costs_only_time(file: Path) -> None:
    whole = file.read_bytes()
    for place in range(0, len(whole), 3):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        shipped._index.cache_clear()
        assert shipped.find("block", ["a"], cache.source_digest()) in (None, b"A" * 1000)
    for end in (0, 1, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:end])
        shipped._index.cache_clear()
        assert asked(key=f"a{end}") == b"made"


def test_the_same_traces_are_the_same_file(file: Path) -> None:
    first = file.read_bytes()
    write(file, cache.source_digest())
    assert file.read_bytes() == first


def test_a_first_export_with_them_imports_no_torch_and_makes_the_same_file(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    """By tests/ship_traces.py itself, as a release makes them."""
    script, made, models = Path(__file__).parents[1] / "ship_traces.py", tmp_path / "traces.zip", ["tiny llama"]
    told = subprocess.run([sys.executable, script, "-o", made, *models], check=True, capture_output=True, text=True)
    assert json.loads(told.stdout.splitlines()[-1])["models"] == 1
    subprocess.run(["llmexport", "checkpoint", "--arch=llama", "-q", "-o", tmp_path / "ck"], check=True)
    models_made = []
    for name, file, imports in (("with", made, "False"), ("without", tmp_path / "none", "True")):
        environment = os.environ | {"LLMEXPORT_CACHE": str(tmp_path / f"cache-{name}")}
        command = ["onnx", f"--checkpoint={tmp_path / 'ck'}", "-q", "-o", tmp_path / name]
        run = [sys.executable, "-c", CHILD, file, *command]
        ended = subprocess.run(run, check=True, capture_output=True, text=True, env=environment)
        assert ended.stdout.splitlines()[-1] == imports
        models_made.append((tmp_path / name / "model.onnx").read_bytes())
    assert models_made[0] == models_made[1]
