"""A model repository says what the graph takes, in Triton's own schema, and is written whole or not at all."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from arch_cases import DECODERS, ENCODERS, FIRST, KEYED, OF_ONE_GRAPH, TOWERS, Case
from click.testing import CliRunner
from engine_folder import make_engine
from google.protobuf.text_format import ParseError
from tiny_configs import read
from triton_proto import ENUMS, parse

from llmexport.export import archs, manifest, onnx_file, random_checkpoint
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.cli.triton import command
from llmexport.export.engine_record import Engine
from llmexport.export.engine_record import read as read_engine
from llmexport.export.spec import Graph, Port
from llmexport.export.static import StaticCache
from llmexport.plugins import library
from llmexport.plugins.errors import UserError
from llmexport.run.errors import RunError
from llmexport.run.triton import write
from llmexport.run.triton_config import model_config

TYPES = {"int64": "TYPE_INT64", "float32": "TYPE_FP32", "float16": "TYPE_FP16", "bfloat16": "TYPE_BF16"}


def config_of(graph: Graph, dtype: str, backend: str = "onnxruntime") -> Any:
    inputs, outputs = (
        tuple(p.typed(dtype) for p in ports) for ports in (graph.assembly.inputs, graph.assembly.outputs)
    )
    text = model_config("m", backend, "model.onnx", inputs, outputs, graph.carried, {"key": 'a "value"'})
    return parse(text)


def tensors(found: Any) -> dict[str, tuple[str, list[int]]]:
    names = {number: name for name, number in ENUMS["DataType"].items()}
    return {t.name: (names[t.data_type], list(t.dims)) for t in found}


def expected(ports: tuple[Port, ...], dtype: str) -> dict[str, tuple[str, list[int]]]:
    return {p.name: (TYPES[p.typed(dtype).dtype], [d if isinstance(d, int) else -1 for d in p.shape]) for p in ports}


@pytest.mark.parametrize("case", [c for c in OF_ONE_GRAPH if c in (*ENCODERS, *KEYED)], ids=str)
def test_a_config_has_the_ports_of_the_graph(case: Case) -> None:
    """Triton would hold states of one size by itself."""
    [graph] = read(case.arch, **case.changes).graphs
    for dtype in ("float32", "float16", "bfloat16"):
        config = config_of(graph, dtype)
        assert tensors(config.input) == expected(graph.assembly.inputs, dtype)
        assert tensors(config.output) == expected(graph.assembly.outputs, dtype)
        assert (config.max_batch_size, config.default_model_filename) == (0, "model.onnx")
        assert not config.HasField("sequence_batching")
        assert [(p.key, p.value.string_value) for p in config.parameters] == [("key", 'a "value"')]


@pytest.mark.parametrize("case", [c for c in FIRST if c in DECODERS], ids=str)
def test_triton_holds_the_states_of_a_static_cache(case: Case) -> None:
    named = archs.load(case.arch)
    [graph] = onnx_file.read_model(named, {**named.tiny, **case.changes}, StaticCache(64)).graphs
    config = config_of(graph, "float16", "tensorrt")
    ports = {p.name: p for p in graph.assembly.inputs}
    states = {s.input_name: s for s in config.sequence_batching.state}
    assert {n: s.output_name for n, s in states.items()} == dict(graph.carried)
    assert not {*graph.carried, *graph.carried.values()} & {t.name for t in (*config.input, *config.output)}
    for name, state in states.items():
        # A sequence is a batch of one.
        shape = [1 if d == "batch" else d for d in ports[name].shape]
        [initial] = state.initial_state
        assert list(state.dims) == list(initial.dims) == shape
        assert state.data_type == initial.data_type == ENUMS["DataType"][TYPES[ports[name].typed("float16").dtype]]
        assert initial.zero_data
        assert state.use_same_buffer_for_input_output == (ports[name].use == "slots")
    assert tensors(config.input)["input_ids"] == ("TYPE_INT64", [1, -1])


def test_an_engine_runs_on_a_gpu_with_its_profile() -> None:
    [graph] = read("llama").graphs
    [group] = config_of(graph, "float16", "tensorrt").instance_group
    assert (group.kind, group.count, list(group.profile)) == (ENUMS["Kind"]["KIND_GPU"], 1, ["0"])
    assert not config_of(graph, "float16").instance_group


def test_the_schema_refuses_what_it_does_not_know() -> None:
    for text in ("kind: 1", "max_batch_size: 1.5", "input { data_type: TYPE_FLOAT }"):
        with pytest.raises(ParseError):
            parse(text)


def engine_of_tensorrt(folder: Path, **made: Any) -> Engine:
    """The folder, made, with an engine that TensorRT may have built."""
    record = make_engine(folder, **made) / "engine.json"
    engine = dataclasses.replace(read_engine(folder), backend="tensorrt", version="10.14.1")
    record.write_text(json.dumps(engine.as_data()))
    return engine


def refusal(write_it: Callable[[], object], left: Path) -> str:
    with pytest.raises(UserError) as error:
        write_it()
    assert not left.exists()
    assert not list(left.parent.glob(".llmexport-*"))
    [line] = str(error.value).splitlines()
    return line


def test_an_engine_is_served_with_both_libraries(tmp_path: Path) -> None:
    out, repo = tmp_path / "out", tmp_path / "repo"
    engine = engine_of_tensorrt(out)
    plugins = Path(engine.plugins[0].file)
    plugins.with_name(library.REGISTER).write_bytes(shared_object())
    made = write(out, repo, name="llm")
    version = repo / "llm" / "1"
    assert (made.backend, made.models, made.register) == ("tensorrt", ("llm",), version / library.REGISTER)
    files = {str(p.relative_to(repo)) for p in repo.rglob("*") if p.is_file()}
    assert files == {
        "llm/config.pbtxt",
        "llm/1/model.plan",
        f"llm/1/{library.FILE}",
        f"llm/1/{library.REGISTER}",
    }
    assert (version / library.FILE).read_bytes() == plugins.read_bytes()
    assert (version / "model.plan").read_bytes() == (out / "model.plan").read_bytes()
    config = parse((repo / "llm" / "config.pbtxt").read_text())
    assert (config.name, config.backend, config.default_model_filename) == ("llm", "tensorrt", "model.plan")
    assert {p.key: p.value.string_value for p in config.parameters}["tensorrt_version"] == "10.14.1"


def test_the_command_says_how_the_server_is_started(tmp_path: Path) -> None:
    out, repo = tmp_path / "out", tmp_path / "repo"
    engine = engine_of_tensorrt(out)
    Path(engine.plugins[0].file).with_name(library.REGISTER).write_bytes(shared_object())
    ran = CliRunner().invoke(command, [str(out), "-o", str(repo), "--json"])
    assert ran.exit_code == 0, ran.output
    register = repo / "llama" / "1" / library.REGISTER
    plugins = f"--backend-config=tensorrt,plugins={register}"
    assert json.loads(ran.stdout)["serve"] == f"tritonserver --model-repository={repo} {plugins}"
    assert register.is_file()


def shared_object() -> bytes:
    """The header of an ELF file without segments or sections."""
    return b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\x00" + bytes(46)


def test_what_triton_cannot_serve_is_one_line(tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    make_engine(tmp_path / "rtx")
    engine_of_tensorrt(tmp_path / "cut")
    (tmp_path / "cut" / "model.plan").write_bytes(b"short")
    engine_of_tensorrt(tmp_path / "gone")
    (tmp_path / "gone" / "model.plan").unlink()
    engine_of_tensorrt(tmp_path / "alone")
    engine_of_tensorrt(tmp_path / "beside", weights={"matrix": np.ones((2, 3), np.float32)})
    (tmp_path / "empty").mkdir()
    for folder, said in {
        "rtx": "holds an engine of tensorrt-rtx, and Triton loads those of TensorRT: build one where the GPU is",
        "cut": "model.plan has 5 bytes, engine.json says 1000: build it again: llmexport engine",
        "gone": "model.plan: No such file or directory: build it again: llmexport engine",
        "alone": f"{library.REGISTER} is no plugin library: No such file or directory. Build it",
        "beside": "has its weights beside the plan, which Triton does not bind: llmexport engine",
        "empty": "holds no engine: build one: llmexport engine",
    }.items():
        line = refusal(lambda folder=folder: write(tmp_path / folder, repo, backend="tensorrt"), repo)
        assert said in line
    assert "is no export" in refusal(lambda: write(tmp_path / "empty", repo), repo)
    assert "choose one of tensorrt, onnxruntime" in refusal(lambda: write(tmp_path / "rtx", repo, backend="x"), repo)
    assert "make it of letters" in refusal(lambda: write(tmp_path / "rtx", repo, name="../x"), repo)
    repo.mkdir()
    with pytest.raises(RunError, match="exists: choose another folder for the repository"):
        write(tmp_path / "rtx", repo)
    assert not list(repo.iterdir())


@pytest.mark.model
@pytest.mark.parametrize("arch", ["llama", ENCODERS[0].arch])
def test_an_export_is_served_from_its_own_weights(arch: str, exported, tmp_path: Path) -> None:
    out, repo = exported(arch), tmp_path / "repo"
    export = manifest.read(out)
    made = write(out, repo, weights="link")
    assert (made.backend, made.models, made.register) == ("onnxruntime", (arch,), None)
    version = repo / arch / "1"
    assert {p.name for p in version.iterdir()} == {"model.onnx", *(w.file for w in export.weights)}
    assert all((version / w.file).samefile(out / w.file) for w in export.weights)
    config = parse((repo / arch / "config.pbtxt").read_text())
    assert config.backend == "onnxruntime"
    # A cache that grows goes through the client.
    assert len(made.notes) == (1 if export.graphs[0].carried else 0)


@pytest.mark.model
def test_what_sees_is_a_model_beside_the_decoder(exported, tmp_path: Path) -> None:
    out, repo = exported(TOWERS[0], "float16", part="all"), tmp_path / "repo"
    made = write(out, repo, weights="link")
    vision, decoder = manifest.read(out).graphs
    assert made.models == tuple(f"{TOWERS[0].arch}-{g.name}" for g in (vision, decoder))
    features, width = vision.assembly.outputs[0].name, vision.assembly.outputs[0].shape[1]
    found = {g.name: parse((repo / f"{TOWERS[0].arch}-{g.name}/config.pbtxt").read_text()) for g in (vision, decoder)}
    given = tensors(found["vision"].output)[features]
    assert given == tensors(found["decoder"].input)[features] == ("TYPE_FP16", [-1, width])
    [note] = [n for n in made.notes if features in n]
    assert note.endswith(f"the client gives no rows of it: [0, {width}]")


@pytest.mark.model
def test_a_block_alone_is_not_called_like_the_whole_model(exported, tmp_path: Path) -> None:
    assert write(exported("llama", block="mlp"), tmp_path / "repo").models == ("llama-mlp",)
    assert (tmp_path / "repo/llama-mlp/config.pbtxt").read_text().startswith('name: "llama-mlp"')


@pytest.mark.model
def test_an_export_without_bodies_is_refused(tmp_path: Path) -> None:
    random_checkpoint.write(archs.load("llama"), tmp_path / "checkpoint")
    request = onnx_file.Request(archs.load("llama"), open_checkpoint(tmp_path / "checkpoint"), target="tensorrt")
    onnx_file.write(request, tmp_path / "out")
    repo = tmp_path / "repo"
    assert "without function bodies" in refusal(lambda: write(tmp_path / "out", repo), repo)
