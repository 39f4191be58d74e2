import copy
import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from llmexport.export import archs, checkpoint, engine, onnx_file, random_checkpoint
from llmexport.export.errors import EngineError, ExportError
from llmexport.export.spec import Port
from onnx import TensorProto
from onnx.helper import make_function, make_graph, make_model, make_node, make_opsetid, make_tensor_value_info

ARCHS = ("gemma", "llama", "mistral", "qwen2")
DTYPES = ("float32", "float16", "bfloat16")
BLOCKS = ("embedding", "rotary", "mask", "attention", "head")
OLD = {engine.PLAN: b"an earlier plan", engine.RECORD: b"an earlier record"}

# (arch, dtype, block) -> the folder of a tiny export
Export = Callable[..., Path]


def silent(step: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Tiny exports, made once and not to be written to."""

    @functools.cache
    def weights(arch: str) -> checkpoint.Checkpoint:
        folder = tmp_path_factory.mktemp("checkpoint") / arch
        random_checkpoint.write(archs.load(arch), folder)
        return checkpoint.open_checkpoint(folder)

    @functools.cache
    def make(arch: str, dtype: str = "float32", block: str | None = None) -> Path:
        folder = tmp_path_factory.mktemp("export") / arch
        request = onnx_file.Request(archs.load(arch), weights(arch), dtype, block)
        onnx_file.write(request, folder, force=False, progress=silent)
        return folder

    return make


@pytest.fixture
def folder(exported: Export, tmp_path: Path) -> Path:
    """An export of one small block with an earlier engine in it, for what fails before or in the builder."""
    return linked(exported("llama", block="embedding"), tmp_path, OLD)


def linked(source: Path, target: Path, files: dict[str, bytes] | None = None) -> Path:
    """A copy to write to, of an export whose own files are not touched."""
    folder = target / "export"
    shutil.copytree(source, folder, copy_function=os.link)
    for name, data in (files or {}).items():
        (folder / name).write_bytes(data)
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def child(code: str) -> tuple[str, ...]:
    """A command in place of the builder's."""
    return (sys.executable, "-c", code)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHS)
def test_builds_every_architecture_in_every_dtype(arch: str, dtype: str, exported: Export, tmp_path: Path) -> None:
    folder = linked(exported(arch, dtype), tmp_path)
    before = tree(folder)
    record = engine.build(folder, progress=silent)
    plan = (folder / engine.PLAN).read_bytes()
    assert record["plan"] == {"bytes": len(plan), "sha256": hashlib.sha256(plan).hexdigest()}
    assert record["layers"]["ATTENTION_INPUT"] == archs.load(arch).arch.tiny["num_hidden_layers"]
    assert tree(folder) == before | {n: (folder / n).read_bytes() for n in (engine.PLAN, engine.RECORD)}


@pytest.mark.parametrize("block", BLOCKS)
def test_builds_a_block_alone(block: str, exported: Export, tmp_path: Path) -> None:
    record = engine.build(linked(exported("llama", block=block), tmp_path), progress=silent)
    assert record["block"] == block
    assert set(record["profile"]) == {d for p in record["inputs"] for d in p["shape"] if isinstance(d, str)} | (
        {"past"} if block == "mask" else set()
    )


def test_engine_json_says_what_was_built_of_what(exported: Export, tmp_path: Path) -> None:
    folder = linked(exported("llama", block="attention"), tmp_path)
    steps = []
    record = engine.build(
        folder, profile=engine.parse_profile("batch=2,past=0:8:16"), progress=lambda *step: steps.append(step)
    )
    on_disk = json.loads((folder / engine.RECORD).read_bytes())
    assert on_disk == json.loads(json.dumps(record))
    assert on_disk["model_sha256"] == hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    assert on_disk["profile"] == {
        "batch": [2, 2, 2],
        "sequence": [1, 64, 512],
        "past": [0, 8, 16],
        "total": [1, 72, 528],
    }
    said = {k: on_disk[k] for k in ("backend", "arch", "block", "dtype", "plugins", "messages")}
    assert said == {
        "backend": "tensorrt-rtx",
        "arch": "llama",
        "block": "attention",
        "dtype": "float32",
        "plugins": [],
        "messages": [],
    }
    assert on_disk["version"] == importlib.metadata.version("tensorrt_rtx")
    assert [p["name"] for p in on_disk["outputs"]] == ["attended", "present_key", "present_value"]
    assert steps == [("engine: read", 0, 2), ("engine: build", 1, 2), ("engine", 2, 2)]


def test_a_later_engine_takes_the_place_of_an_earlier(folder: Path) -> None:
    record = engine.build(folder, progress=silent)
    assert json.loads((folder / engine.RECORD).read_bytes())["plan"] == record["plan"]
    assert len((folder / engine.PLAN).read_bytes()) == record["plan"]["bytes"]


def test_the_form_for_tensorrt_computes_what_the_model_computes(exported: Export) -> None:
    folder = exported("gemma")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    form = engine.tensorrt_form(model)
    assert not form.functions
    random = np.random.default_rng(0)
    feeds = {"input_ids": random.integers(0, 256, (2, 5)), "position_ids": np.arange(3, 8)[None].repeat(2, 0)}
    feeds |= {"attention_mask": np.ones((2, 8), np.int64)}
    for value in model.graph.input[3:]:
        heads, size = (value.type.tensor_type.shape.dim[i].dim_value for i in (1, 3))
        feeds[value.name] = random.standard_normal((2, heads, 3, size), np.float32)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    runs = [
        onnxruntime.InferenceSession(m.SerializeToString(), options, ["CPUExecutionProvider"]).run(None, feeds)
        for m in (model, form)
    ]
    for expected, found in zip(*runs, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_two_bodies_of_one_name_stay_two() -> None:
    opsets = [make_opsetid("", 23), make_opsetid("llmexport", 1)]
    bodies = [
        make_function("llmexport", "F", ["x"], ["y"], [make_node(op, ["x"], ["y"])], opsets[:1], overload=op)
        for op in ("Relu", "Neg")
    ]
    calls = [
        make_node("F", ["a"], ["b"], domain="llmexport", overload="Relu"),
        make_node("F", ["b"], ["c"], domain="llmexport", overload="Neg"),
    ]
    form = engine.tensorrt_form(model_of(calls, ["a"], ["c"], opsets, bodies))
    assert [n.op_type for n in form.graph.node] == ["Relu", "Neg"]


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        (make_node("F", ["a"], ["b"], "n", domain="llmexport"), "n: llmexport::F has no body"),
        (make_node("Attention", ["a", "a", "a"], ["b"], "n", is_causal=1), "ignores is_causal of Attention"),
        (make_node("Attention", ["a", "a", "a"], ["b"], "n", softcap=5.0), "ignores softcap of Attention"),
        (make_node("Attention", ["a"] * 3 + [""] * 3 + ["k"], ["b"], "n"), "ignores k of Attention"),
    ],
)
def test_refuses_what_tensorrt_would_misread(node: onnx.NodeProto, reason: str) -> None:
    with pytest.raises(EngineError, match=reason):
        engine.tensorrt_form(model_of([node], ["a"], ["b"]))


def model_of(
    nodes: list[onnx.NodeProto],
    inputs: list[str],
    outputs: list[str],
    opsets: list[onnx.OperatorSetIdProto] | None = None,
    functions: list[onnx.FunctionProto] | None = None,
) -> onnx.ModelProto:
    values = [[make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 4]) for n in names] for names in (inputs, outputs)]
    graph = make_graph(nodes, "g", *values)
    opsets = opsets or [make_opsetid("", 24), make_opsetid("llmexport", 1)]
    return make_model(graph, functions=functions or [], opset_imports=opsets, ir_version=10)


def test_an_input_that_tensorrt_does_not_use_is_an_error(folder: Path) -> None:
    model = model_of([make_node("Relu", ["a"], ["b"])], ["a", "unused"], ["b"])
    with pytest.raises(EngineError, match="another graph than the model's: WARNING: Unused Input: unused"):
        build_instead(folder, model)


def test_a_node_that_tensorrt_cannot_read_is_named(folder: Path) -> None:
    model = model_of([make_node("NonZero", ["a"], ["b"], "the_node")], ["a"], ["b"])
    with pytest.raises(EngineError, match=r"cannot read the model: NonZero the_node: .*plugin creator"):
        build_instead(folder, model)


def test_a_model_that_the_manifest_does_not_describe_is_an_error(folder: Path) -> None:
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").write_bytes(model_of([make_node("Relu", ["a"], ["b"])], ["a"], ["b"]).SerializeToString())
    with pytest.raises(EngineError, match=r"reads input_ids as None, the export says \['int64', \[-1, -1\]\]"):
        engine.build(folder, progress=silent)
    assert tree(folder).items() >= OLD.items()


def build_instead(folder: Path, model: onnx.ModelProto) -> None:
    """Builds `model` in place of the export's, which must fail and leave the folder as it was."""
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for kind, values in (("inputs", model.graph.input), ("outputs", model.graph.output)):
        manifest[kind] = [{"name": v.name, "shape": ["batch", 4], "dtype": "float32"} for v in values]
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    before = tree(folder)
    try:
        engine.build(folder, progress=silent)
    finally:
        assert tree(folder) == before


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        ("import os; os.abort()", "killed by SIGABRT"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL, as happens when memory runs out"),
        ("raise SystemExit(3)", "ended with exit code 3"),
        ("print('[\"log\", \"half an ev', end='')", "ended with exit code 0"),
    ],
)
def test_a_death_of_the_builder_is_reported(
    code: str, reason: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(folder)
    monkeypatch.setattr(engine, "COMMAND", child(code))
    with pytest.raises(EngineError, match=f"^TensorRT's builder was {reason}$|^TensorRT's builder {reason}$"):
        engine.build(folder, progress=silent)
    assert tree(folder) == before


def test_the_last_messages_of_a_dead_builder_are_shown_and_no_more(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
import json, os, sys
for i in range(1000):
    print(json.dumps(["log", f"message {i}"]), flush=True)
    print(f"noise {i}", file=sys.stderr, flush=True)
os.abort()
"""
    monkeypatch.setattr(engine, "COMMAND", child(code))
    with pytest.raises(EngineError) as caught:
        engine.build(folder, progress=silent)
    lines = str(caught.value).splitlines()
    assert lines[1:] == [f"  {kind} {i}" for kind in ("message", "noise") for i in range(980, 1000)]


def test_a_builder_that_takes_too_long_is_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(folder)
    monkeypatch.setattr(engine, "COMMAND", child("import time; time.sleep(60)"))
    with pytest.raises(EngineError, match=r"was stopped after 0\.2 s"):
        engine.build(folder, timeout=0.2, progress=silent)
    assert tree(folder) == before


def test_a_full_disk_leaves_the_earlier_engine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(folder)
    monkeypatch.setattr(engine, "COMMAND", child("""import errno; print(f'["unwritable", {errno.ENOSPC}]')"""))
    with pytest.raises(ExportError, match=r"cannot write .*model\.plan: No space left on device: free space"):
        engine.build(folder, progress=silent)
    assert tree(folder) == before


@pytest.mark.parametrize("moment", ["engine: read", "engine: build"])
def test_ctrl_c_leaves_no_process_and_no_file(
    moment: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(folder)
    started: list[subprocess.Popen[str]] = []

    def popen(*args: Any, **kwargs: Any) -> subprocess.Popen[str]:
        started.append(Popen(*args, **kwargs))
        return started[0]

    def interrupt(step: str, done: int, total: int) -> None:
        if step == moment:
            raise KeyboardInterrupt

    Popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(KeyboardInterrupt):
        engine.build(folder, progress=interrupt)
    assert [p.returncode for p in started] == ([-9] if moment == "engine: build" else [])
    assert tree(folder) == before


def test_the_builder_ends_when_its_parent_is_gone(exported: Export, tmp_path: Path) -> None:
    """The other end of its stdin is closed while it waits for a job, which a fifo holds back."""
    os.mkfifo(tmp_path / "job.json")
    process = subprocess.Popen([*engine.COMMAND, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert process.stdin
    time.sleep(0.5)
    assert process.poll() is None
    process.stdin.close()
    assert process.wait(timeout=10) == 1


@pytest.mark.parametrize(
    ("backend", "command"),
    [
        ("tensorrt-rtx", r"pip install tensorrt-rtx$"),
        ("tensorrt", r"pip install tensorrt --extra-index-url https://pypi\.nvidia\.com \(.*GPU.*\)$"),
    ],
)
def test_a_missing_backend_names_its_command_before_anything_else(
    backend: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match=f"^{backend} is not installed: {command}"):
        engine.build(tmp_path / "no such folder", backend=backend, progress=silent)


def test_a_folder_that_is_no_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is no export"):
        engine.build(tmp_path, progress=silent)


@pytest.mark.parametrize(("data", "reason"), [(None, "is missing"), (b"\xff\xff", "is damaged")])
def test_an_export_without_its_model_is_refused(data: bytes | None, reason: str, folder: Path) -> None:
    (folder / "model.onnx").unlink()
    if data:
        (folder / "model.onnx").write_bytes(data)
    with pytest.raises(EngineError, match=f"model.onnx {reason}.*: export again"):
        engine.build(folder, progress=silent)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", r"says '': write name=min:opt:max"),
        ("batch", r"says 'batch': write name=min:opt:max"),
        ("batch=1:2", r"says 'batch=1:2': write name=min:opt:max"),
        ("batch=1:1:4,", r"says '': write name=min:opt:max"),
        ("batch=one:two:three", r"write name=min:opt:max"),
        ("batch=-1:1:4", r"write name=min:opt:max"),
        ("batch=١", r"write name=min:opt:max"),
        ("batch=" + "9" * 5000, r"write name=min:opt:max"),
        ("batch=4:1:1", r"says batch=4:1:1: make it 1 <= min <= opt <= max"),
        ("batch=1:5:4", r"says batch=1:5:4: make it 1 <= min <= opt <= max"),
        ("batch=0:1:4", r"says batch=0:1:4: make it 1 <= min <= opt <= max"),
        ("batch=1:1:9999999999", r"make it 1 <= min <= opt <= max < 2\*\*31"),
        ("batch=1,batch=2", r"names batch twice"),
        ("total=1:2:3", r"total is past \+ sequence: name those"),
    ],
)
def test_a_bad_profile_is_refused_in_one_line(text: str, reason: str) -> None:
    with pytest.raises(EngineError, match=reason) as caught:
        engine.parse_profile(text)
    assert "\n" not in str(caught.value)


def test_a_profile_of_another_export_is_refused(folder: Path) -> None:
    with pytest.raises(EngineError, match=r"names past, rows: this export has the sizes batch, sequence$"):
        engine.build(folder, profile=engine.parse_profile("rows=1,past=0:1:2"), progress=silent)


def test_a_dimension_without_default_must_be_named() -> None:
    ports = [Port("x", ("batch", "experts", 8))]
    with pytest.raises(EngineError, match="experts has no default sizes"):
        engine.Profile().resolve(ports)
    assert engine.parse_profile("experts=1:2:4").resolve(ports) == {"batch": (1, 1, 4), "experts": (1, 2, 4)}
