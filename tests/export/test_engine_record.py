"""What engine.json says is read strictly, and held against the files, the TensorRT and the GPU that are here."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_folder import PLAN, make_engine

from llmexport.export import device, engine_backend, engine_record
from llmexport.export.cli.engine import summary
from llmexport.export.device import Device
from llmexport.export.errors import EngineError

B200 = Device("B200", (10, 0))
CURE = "install tensorrt, and take --backend tensorrt"
H200, H100, A100 = Device("H200", (9, 0)), Device("H100", (9, 0)), Device("A100", (8, 0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_engine(tmp_path / "out")


def test_a_record_is_read_as_it_was_written(folder: Path) -> None:
    engine = engine_record.read(folder)
    assert json.loads((folder / "engine.json").read_text()) == json.loads(json.dumps(engine.as_data()))
    assert engine.graphs["model"].inputs[1].shape == ("batch", 2, "past", 8)
    assert engine.profile["batch"] == (1, 1, 4)
    engine_record.check_files(folder, engine)
    assert engine_record.read_plan(folder / PLAN, engine.graphs["model"]) == (folder / PLAN).read_bytes()


def leaves(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values in JSON data."""
    yield path
    if isinstance(data, (dict, list)):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from leaves(value, (*path, key))


def edited(data: dict[str, Any], path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> dict[str, Any]:
    data = copy.deepcopy(data)
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    change(inner, path[-1])
    return data


def refused(folder: Path, data: Any) -> str:
    """The one line that a record is refused with."""
    (folder / "engine.json").write_text(data if isinstance(data, str) else json.dumps(data))
    with pytest.raises(EngineError) as error:
        engine_record.read(folder)
    assert "\n" not in str(error.value)
    assert "llmexport engine" in str(error.value)
    return str(error.value)


def test_a_value_of_another_type_is_refused_wherever_it_is(folder: Path) -> None:
    data = json.loads((folder / "engine.json").read_text())
    places = [p for p in leaves(data) if p]
    assert len(places) > 60
    for place in places:
        refused(folder, edited(data, place, lambda inner, key: inner.__setitem__(key, True)))


def test_a_key_too_few_or_too_many_is_refused(folder: Path) -> None:
    data = json.loads((folder / "engine.json").read_text())
    named = [p for p in leaves(data) if p and isinstance(p[-1], str)]
    # A mapping may hold any names, and a plan may lack its kernels.
    fixed = [p for p in named if p[-2:-1] not in [(m,) for m in ("profile", "graphs", "carried", "layers", "plugins")]]
    fixed.remove(("graphs", "model", "kernels"))
    for place in fixed:
        refused(folder, edited(data, place, lambda inner, key: inner.pop(key)))
        refused(folder, edited(data, place, lambda inner, key: inner.__setitem__(f"{key}x", inner[key])))
    assert len(fixed) > 40


def test_a_record_without_kernels_is_read_and_tells_of_none(folder: Path) -> None:
    assert dict(summary(engine_record.read(folder)))["kernels"] == "4 a step: 2 plugin, 1 gemm, 1 copy"
    data = json.loads((folder / "engine.json").read_text())
    del data["graphs"]["model"]["kernels"]
    (folder / "engine.json").write_text(json.dumps(data))
    engine = engine_record.read(folder)
    assert engine.graphs["model"].kernels is None
    assert "kernels" not in dict(summary(engine))
    refused(folder, edited(data, ("graphs", "model", "kernel"), lambda inner, key: inner.__setitem__(key, [])))


def test_a_record_that_ends_anywhere_is_refused(folder: Path) -> None:
    text = (folder / "engine.json").read_text()
    for end in range(0, len(text) - 1, 97):
        refused(folder, text[:end])


def test_a_record_of_another_format_says_so(folder: Path) -> None:
    data = json.loads((folder / "engine.json").read_text())
    said = refused(folder, data | {"format": 2})
    assert said.endswith(f"is of format 2, this version reads 4: build it again: llmexport engine {folder}")


@pytest.mark.parametrize("place", [("graphs", "model"), ("weights", 0)], ids=str)
def test_a_file_outside_of_the_folder_is_refused(place: tuple[Any, ...], folder: Path) -> None:
    data = json.loads((folder / "engine.json").read_text())
    holder = data[place[0]][place[1]]
    holder["file"] = f"../{holder['file']}"
    assert "no name of a file" in refused(folder, data)


def test_a_folder_without_an_engine_says_how_to_build_one(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="holds no engine: build one: llmexport engine"):
        engine_record.read(tmp_path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def altered(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        (PLAN, cut, "has 999 bytes, engine.json says 1000: build it again"),
        (PLAN, altered, "is not the plan that engine.json describes: build it again"),
        (PLAN, Path.unlink, "No such file or directory: build it again"),
        ("plugins.so", cut, "is not what it was: put the plugin library back"),
        ("plugins.so", altered, "is not what it was: put the plugin library back"),
        ("plugins.so", Path.unlink, "No such file or directory: put the plugin library back"),
    ],
)
def test_a_file_that_is_another_one_is_refused(folder: Path, name: str, change, says: str) -> None:
    engine = engine_record.read(folder)
    change(folder / name)
    with pytest.raises(EngineError, match=re.escape(says)):
        engine_record.check_files(folder, engine)
    if name == PLAN:
        with pytest.raises(EngineError, match=re.escape(says)):
            engine_record.read_plan(folder / name, engine.graphs["model"])


def test_another_version_of_tensorrt_is_refused(folder: Path) -> None:
    engine = engine_record.read(folder)
    engine_record.check_version(folder, engine, "1.7.1.116")
    for other in ("1.7.1.117", "1.7.1", "1.8.0.1"):
        said = (
            f"was built by tensorrt-rtx 1.7.1.116, {other} is installed here: install that version, or build it again"
        )
        with pytest.raises(EngineError, match=re.escape(said)):
            engine_record.check_version(folder, engine, other)


@pytest.mark.parametrize(
    ("backend", "built_on", "device", "says"),
    [
        ("tensorrt-rtx", None, A100, ""),
        ("tensorrt-rtx", None, H200, ""),
        ("tensorrt-rtx", None, Device("T4", (7, 5)), "error: take a GPU of compute capability 8.0 or later"),
        ("tensorrt", H200, H200, ""),
        ("tensorrt", H200, H100, "built on H200, run on H100"),
        ("tensorrt", H200, A100, "error: was built on H200 (compute capability 9.0), here is A100 (compute"),
        ("tensorrt", A100, H200, "error: on the GPU that it is for, build it again"),
        ("tensorrt", None, H200, ""),
    ],
)
def test_the_gpu_must_be_one_that_the_plan_runs_on(folder: Path, backend, built_on, device, says: str) -> None:
    least = (8, 0) if backend == "tensorrt-rtx" else None
    engine = dataclasses.replace(engine_record.read(folder), backend=backend, built_on=built_on, least=least)
    if says.startswith("error: "):
        with pytest.raises(EngineError, match=re.escape(says.removeprefix("error: "))):
            engine_record.check_device(folder, engine, device)
    else:
        assert engine_record.check_device(folder, engine, device) == says


def test_a_flavour_that_is_not_installed_says_how_to_install_it() -> None:
    if engine_backend.importlib.util.find_spec("tensorrt"):
        pytest.skip("tensorrt is installed")
    with pytest.raises(EngineError, match="tensorrt is not installed: pip install tensorrt"):
        engine_backend.check_backend("tensorrt")


def test_digests_are_of_the_whole_plan(folder: Path) -> None:
    data = (folder / PLAN).read_bytes()
    assert engine_record.read(folder).graphs["model"].sha256 == hashlib.sha256(data).hexdigest()


def test_the_advice_builds_an_engine_of_the_same_kind(folder: Path) -> None:
    engine = engine_record.read(folder)
    (folder / PLAN).unlink()
    for at, end in (("inside", " --backend tensorrt-rtx"), ("beside", " --backend tensorrt-rtx --weights beside")):
        with pytest.raises(EngineError, match=f"llmexport engine {folder}{end}$"):
            engine_record.check_files(folder, dataclasses.replace(engine, weights_at=at))


def test_a_model_whose_weights_are_all_small_says_that_none_lies_beside_the_plan(folder: Path) -> None:
    engine = engine_record.read(folder)
    assert "weights" not in dict(summary(engine))
    beside = dataclasses.replace(engine, weights_at="beside")
    assert dict(summary(beside))["weights"] == "in the plan, as none is large enough to lie beside it"


@pytest.mark.parametrize(
    ("backend", "here", "says"),
    [
        ("tensorrt-rtx", A100, ""),
        ("tensorrt-rtx", Device("RTX 5090", (12, 0)), ""),
        ("tensorrt-rtx", "no GPU is found here", ""),
        ("tensorrt", H200, ""),
        *(("tensorrt-rtx", gpu, f"; not on the {gpu.text} that is here: {CURE}") for gpu in (H200, B200)),
    ],
)
def test_a_gpu_that_the_plan_does_not_run_on_is_said_where_it_is_built(
    folder: Path, monkeypatch: pytest.MonkeyPatch, backend: str, here: Device | str, says: str
) -> None:
    monkeypatch.setattr(device, "first", lambda: here)
    engine = dataclasses.replace(engine_record.read(folder), backend=backend)
    assert dict(summary(engine))["runs on"] == engine.target + says


@pytest.mark.parametrize(
    ("least", "says"),
    [
        ("8.0", "8.0 and later, but not 9.x (H100, H200), 10.x (B200), 11.x (Thor)"),
        ("8.9", "8.9 and later, but not 9.x (H100, H200), 10.x (B200), 11.x (Thor)"),
        ("10.0", "10.0 and later, but not 10.x (B200), 11.x (Thor)"),
        ("12.0", "12.0 and later"),
    ],
)
def test_what_tensorrt_rtx_leaves_out_is_in_its_target(least: str, says: str) -> None:
    assert engine_backend.BACKENDS["tensorrt-rtx"].runs_on(least) == f"NVIDIA GPUs of compute capability {says}"
