import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import onnx
import psutil
import pytest
from arch_cases import EVERY_TIME, FIRST, ONCE, PRIMARY, SLOTS, TOWERS, Case, others_slow
from one_node import model_of, rtx_build
from onnx.helper import make_node
from reseal import reseal
from tiny_configs import read

from llmexport.export import builder, engine, engine_build, engine_record, manifest
from llmexport.export.assembly import parts
from llmexport.export.errors import EngineError, ExportError
from llmexport.export.profile import Profile, parse_profile
from llmexport.export.spec import (
    DTYPES,
    Attention,
    DisentangledAttention,
    LatentAttention,
    Port,
    behind,
    patch_axis,
    to_data,
)

PLAN = "model.plan"
OLD = {PLAN: b"an earlier plan", engine_record.RECORD: b"an earlier record"}

pytestmark = pytest.mark.engine

Export = Callable[..., Path]


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


def replace(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def tree(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def child(code: str) -> tuple[str, ...]:
    """A command in place of the builder's."""
    return (sys.executable, "-c", code)


# The five families in every dtype, the next ones and other kinds of attention in one; all are with plugins, in
# test_engine_plugins.py.
BUILT = (*EVERY_TIME, "deberta", "deepseek_v2")
BUILDS = [(c, d) for c in FIRST for d in DTYPES if c.arch in PRIMARY or (c.arch in BUILT and d == "float16")]
FAMILIES = [(c, d) for c, d in ONCE if c.arch in PRIMARY]


@pytest.mark.parametrize(("case", "dtype"), others_slow(BUILDS, FAMILIES), ids=str)
def test_builds_every_architecture_from_bodies(case: Case, dtype: str, exported: Export, tmp_path: Path) -> None:
    folder = linked(exported(case, dtype), tmp_path)
    before = tree(folder)
    record = engine.build(folder)
    plan = (folder / PLAN).read_bytes()
    [built] = record.graphs.values()
    assert (built.bytes, built.sha256) == (len(plan), hashlib.sha256(plan).hexdigest())
    inside = [part.block for step in manifest.read(folder).steps for part in parts(step)]
    masked = [b for b in inside if isinstance(b, DisentangledAttention | LatentAttention)]
    masked += [b for b in inside if isinstance(b, Attention) and not b.spans]
    # In float32 attention is written out.
    assert built.layers.get("ATTENTION_INPUT", 0) == (0 if dtype == "float32" else len(masked))
    assert tree(folder) == before | {n: (folder / n).read_bytes() for n in (PLAN, engine_record.RECORD)}


# Of each attention that a fused kernel of TensorRT-RTX runs, this stands in the plan.
FUSED = b"_mha_v2_callback"
PER_ATTENTION = 4
SEEING_ONCE = [(TOWERS[0], "float16"), (TOWERS[-1], "bfloat16")]
# All in the dtype that has fused kernels everywhere.
SEEING = [*((c, "float16") for c in TOWERS), SEEING_ONCE[1], (TOWERS[-1], "float32")]


@pytest.mark.parametrize(("case", "dtype"), others_slow(SEEING, SEEING_ONCE), ids=str)
def test_both_graphs_of_a_multimodal_export_are_built(case: Case, dtype: str, exported: Export, tmp_path: Path) -> None:
    """Attention in 16 bits has a fused kernel, with the mask of packed patches and without one."""
    folder = linked(exported(case, dtype, part="all"), tmp_path)
    record = engine.build(folder)
    graphs = manifest.read(folder).graphs
    assert [*record.graphs] == [g.name for g in graphs] == ["vision", "decoder"]
    for graph in graphs:
        inside = [part.block for step in graph.assembly.steps for part in parts(step)]
        fused = 0 if dtype == "float32" else sum(isinstance(b, Attention) and not b.spans for b in inside)
        plan = record.graphs[graph.name]
        assert (folder / plan.file).read_bytes().count(FUSED) == PER_ATTENTION * fused
        assert plan.messages == ()
    # The prompt of a picture, and every step without one.
    assert record.profile["spliced"][0] == 0


def attention_of(head_size: int, tile: int) -> onnx.ModelProto:
    """One Attention of a tower in fp16: over tiles of so many tokens without a mask, or else over packed patches."""
    masked = not tile
    rows, tokens = ("tiles", tile) if tile else (1, "patches")
    kinds = dict.fromkeys(["q", "k", "v", "y"], onnx.TensorProto.FLOAT16) | {"mask": onnx.TensorProto.BOOL}
    shapes = {n: (rows, 1, tokens, tokens) if n == "mask" else (rows, 16, tokens, head_size) for n in kinds}
    values = {n: onnx.helper.make_tensor_value_info(n, kinds[n], shapes[n]) for n in kinds}
    inputs = ["q", "k", "v"] + ["mask"] * masked
    graph = onnx.helper.make_graph(
        [make_node("Attention", inputs, ["y"], scale=0.1)], "one", [values[n] for n in inputs], [values["y"]]
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=10)


# Of Qwen3.5, of Gemma 3 and of Llama 4 as they are published; and one for which there is no such kernel.
@pytest.mark.parametrize(
    ("head_size", "tile", "fused"), [(72, 0, True), (72, 4096, True), (88, 577, True), (512, 0, False)]
)
def test_the_heads_of_published_towers_have_a_fused_kernel(
    head_size: int, tile: int, fused: bool, tmp_path: Path
) -> None:
    sizes = {"patches": (4, 1024, 8192), "tiles": (1, 5, 17)}
    assert rtx_build(attention_of(head_size, tile), sizes, tmp_path) == ["built"]
    assert (FUSED in (tmp_path / engine_build.PLAN).read_bytes()) == fused


# Each of the families in one dtype, and each dtype in some.
IN_PLACE = [*zip(PRIMARY, ("bfloat16", "float16", "float32", "bfloat16", "float16"), strict=True)]


@pytest.mark.parametrize(("case", "dtype"), others_slow(IN_PLACE, IN_PLACE[1:2]))
def test_an_engine_of_a_static_cache_writes_it_in_place(case: str, dtype: str, exported: Export, tmp_path) -> None:
    """Every state of use "slots" is written by TensorRT's own layer for that, and no size is named that grows."""
    folder = linked(exported(case, dtype, slots=SLOTS), tmp_path)
    record = engine.build(folder, plugins=None)
    [graph] = manifest.read(folder).graphs
    in_place = [p for p in graph.assembly.inputs if p.use == "slots"]
    assert record.graphs[graph.name].layers["KV_CACHE_UPDATE"] == len(in_place) > 0
    assert record.profile == {"batch": (1, 1, 4), "sequence": (1, 64, SLOTS), "written": (1, SLOTS, SLOTS)}


@pytest.mark.parametrize(
    ("block", "dims"),
    [
        ("embedding", {"batch", "sequence"}),
        ("mask", {"batch", "sequence", "past", "total"}),
        ("attention", {"batch", "sequence", "past", "total"}),
    ],
)
def test_builds_a_block_alone(block: str, dims: set[str], exported: Export, tmp_path: Path) -> None:
    record = engine.build(linked(exported("llama", block=block), tmp_path))
    assert (record.block, set(record.profile)) == (block, dims)


def test_engine_json_says_what_was_built_of_what(exported: Export, tmp_path: Path) -> None:
    folder = linked(exported("llama", block="attention"), tmp_path)
    profile = parse_profile("batch=2,past=0:8:16")
    steps: list[tuple[str, int, int]] = []
    engine.build(folder, profile=profile, progress=lambda *step: steps.append(step))
    record = json.loads((folder / engine_record.RECORD).read_bytes())
    described = json.loads((folder / "manifest.json").read_bytes())
    [graph] = described["graphs"].values()
    plan = record["graphs"]["model"]
    assert (plan.pop("seconds") > 0, {"gemm", "generated"} <= {k["kind"] for k in plan.pop("kernels")}) == (True, True)
    assert "ATTENTION_INPUT" not in plan.pop("layers")
    assert plan.pop("bytes") == (folder / PLAN).stat().st_size
    assert plan.pop("sha256") == hashlib.sha256((folder / PLAN).read_bytes()).hexdigest()
    ports = {kind: [dict(p) for p in graph[kind]] for kind in ("inputs", "outputs")}
    for port in (*ports["inputs"], *ports["outputs"]):
        del port["is"]
        port["dtype"] = port["dtype"].replace("T", "float32")
    assert record == {
        "format": 4,
        "backend": "tensorrt-rtx",
        "version": importlib.metadata.version("tensorrt_rtx"),
        "target": "NVIDIA GPUs of compute capability 8.0 and later, but not 9.x (H100, H200), 10.x (B200), 11.x (Thor)",
        "least": [8, 0],
        "built_on": None,
        "arch": "llama",
        "block": "attention",
        "dtype": "float32",
        "weights_at": "inside",
        "weights": described["weights"]["files"],
        "checked": "2 of 2 files: every byte as recorded",
        "profile": {"batch": [2, 2, 2], "sequence": [1, 64, 512], "past": [0, 8, 16], "total": [1, 72, 528]},
        "plugins": [],
        "graphs": {
            "model": {
                "file": PLAN,
                "model_sha256": hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest(),
                **ports,
                "carried": {"past_key": "present_key", "past_value": "present_value"},
                "bindings": {},
                "plugins": {},
                "messages": [],
            }
        },
    }
    assert steps == [("engine: read", 0, 2), ("engine: build", 1, 2), ("engine", 2, 2)]


def test_a_later_engine_takes_the_place_of_an_earlier(folder: Path) -> None:
    record = engine.build(folder)
    assert engine_record.read(folder) == record
    assert len((folder / PLAN).read_bytes()) == record.graphs["model"].bytes


def test_an_input_that_tensorrt_does_not_use_is_an_error(folder: Path) -> None:
    model = model_of([make_node("Relu", ["a"], ["b"])], ["a", "unused"], ["b"])
    with pytest.raises(EngineError, match="another graph than the model's: WARNING: Unused Input: unused"):
        build_instead(folder, model)


def test_a_node_that_tensorrt_cannot_read_is_named(folder: Path) -> None:
    model = model_of([make_node("NonZero", ["a"], ["b"], "the_node")], ["a"], ["b"])
    with pytest.raises(EngineError, match=r"cannot read the model: NonZero the_node: .*plugin creator"):
        build_instead(folder, model)


def test_a_model_that_the_manifest_does_not_describe_is_an_error(folder: Path) -> None:
    replace(folder / "model.onnx", model_of([make_node("Relu", ["a"], ["b"])], ["a"], ["b"]).SerializeToString())
    reseal(folder)
    with pytest.raises(EngineError, match=r"reads input_ids as None, the export says \['int64', \[-1, -1\]\]"):
        engine.build(folder)
    assert tree(folder).items() >= OLD.items()


def build_instead(folder: Path, model: onnx.ModelProto) -> None:
    """Builds `model` in place of the export's, which must fail and leave the folder as it was."""
    replace(folder / "model.onnx", model.SerializeToString())
    described = json.loads((folder / "manifest.json").read_bytes())
    for kind, values in (("inputs", model.graph.input), ("outputs", model.graph.output)):
        described["graphs"]["model"][kind] = [to_data(Port(v.name, ("batch", 4))) for v in values]
    replace(folder / "manifest.json", json.dumps(described).encode())
    reseal(folder)
    before = tree(folder)
    try:
        engine.build(folder)
    finally:
        assert tree(folder) == before


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; os.kill(os.getpid(), 11)", "was killed by SIGSEGV"),
        ("import os; os.abort()", "was killed by SIGABRT"),
        ("import os; os.kill(os.getpid(), 9)", "was killed by SIGKILL, as happens when memory runs out"),
        ("raise SystemExit(3)", "ended with exit code 3"),
        ("print('[\"log\", \"half an ev', end='')", "ended with exit code 0"),
    ],
)
def test_a_death_of_the_builder_is_reported(
    code: str, reason: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(folder)
    monkeypatch.setattr(builder, "COMMAND", child(code))
    with pytest.raises(EngineError, match=f"^TensorRT's builder {reason}$"):
        engine.build(folder)
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
    monkeypatch.setattr(builder, "COMMAND", child(code))
    with pytest.raises(EngineError) as caught:
        engine.build(folder)
    lines = str(caught.value).splitlines()
    assert lines[1:] == [f"  {kind} {i}" for kind in ("message", "noise") for i in range(980, 1000)]


def test_what_tensorrt_said_of_a_failed_build_is_shown(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(folder)
    monkeypatch.setattr(builder, "COMMAND", child("""print('["log", "ERROR: no kernel"]\\n["unbuildable"]')"""))
    with pytest.raises(EngineError, match=r"^TensorRT cannot build the model:\n  ERROR: no kernel$"):
        engine.build(folder)
    assert tree(folder) == before


def test_a_builder_that_takes_too_long_is_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(folder)
    monkeypatch.setattr(builder, "COMMAND", child("import time; time.sleep(60)"))
    with pytest.raises(EngineError, match=r"was stopped after 1 s"):
        engine.build(folder, timeout=1)
    assert tree(folder) == before


def test_a_full_disk_leaves_the_earlier_engine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(folder)
    monkeypatch.setattr(builder, "COMMAND", child("""import errno; print(f'["unwritable", {errno.ENOSPC}]')"""))
    with pytest.raises(ExportError, match=r"cannot write .*model\.plan: No space left on device: free space"):
        engine.build(folder)
    assert tree(folder) == before


def test_ctrl_c_leaves_no_process_and_no_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(folder)
    code = f"""
import os, signal, time
open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
os.kill(os.getppid(), signal.SIGINT)
time.sleep(60)
"""
    monkeypatch.setattr(builder, "COMMAND", child(code))
    # nohup, or a shell without job control, may have had it ignored.
    before_handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            engine.build(folder)
    finally:
        signal.signal(signal.SIGINT, before_handler)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert tree(folder) == before


def test_the_builder_ends_when_its_parent_is_gone(tmp_path: Path) -> None:
    # A pipe in place of its job lets it wait.
    os.mkfifo(tmp_path / "job.json")
    process = subprocess.Popen([*builder.COMMAND, str(tmp_path)], stdin=subprocess.PIPE)
    assert process.stdin
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.stdin.close()
    assert process.wait(timeout=10) == 1


# A builder whose thread that waits for the end of stdin never ends, as if TensorRT held the interpreter.
STUCK = """
import sys, time
from pathlib import Path
from llmexport.export import engine_build
engine_build._end_with_parent = lambda: (Path(sys.argv[1]) / "ready").touch() or time.sleep(60)
engine_build.main(Path(sys.argv[1]))
"""
START = """
import subprocess, sys
process = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]], stdin=subprocess.PIPE)
print(process.pid, flush=True)
process.wait()
"""


def test_a_builder_whose_threads_are_stuck_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    # A pipe in place of its job lets it wait.
    os.mkfifo(tmp_path / "job.json")
    command = [sys.executable, "-c", START, STUCK, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        builder = psutil.Process(int(parent.stdout.readline()))
        deadline = time.monotonic() + 20
        while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert builder.is_running()
        parent.kill()
    builder.wait(10)


@pytest.mark.parametrize(
    ("module", "version", "flags"),
    [("tensorrt", "10.15.1.29", 2), ("tensorrt", "11.5.0.1", 0), ("tensorrt_rtx", "1.7.1.116", 0)],
)
def test_networks_are_strongly_typed_where_they_could_be_otherwise(module: str, version: str, flags: int) -> None:
    creation = SimpleNamespace(STRONGLY_TYPED=1)
    trt = SimpleNamespace(__name__=module, __version__=version, NetworkDefinitionCreationFlag=creation)
    assert engine_build._network_flags(trt) == flags


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
        engine.build(tmp_path / "no such folder", backend=backend)


def test_a_folder_that_is_no_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is no export"):
        engine.build(tmp_path)


@pytest.mark.parametrize(("data", "reason"), [(None, "is missing"), (b"\xff\xff", "is not the file")])
def test_an_export_without_its_model_is_refused(data: bytes | None, reason: str, folder: Path) -> None:
    (folder / "model.onnx").unlink()
    if data:
        (folder / "model.onnx").write_bytes(data)
    with pytest.raises(ExportError, match=f"model.onnx {reason}.*: export again"):
        engine.build(folder)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", r"says '': write name=min:opt:max"),
        ("batch", r"says 'batch': write name=min:opt:max"),
        ("batch=1:2", r"says 'batch=1:2': write name=min:opt:max"),
        ("batch=1:1:4,", r"says '': write name=min:opt:max"),
        ("batch=one:two:three", r"write name=min:opt:max"),
        ("batch=-1:1:4", r"write name=min:opt:max"),
        ("batch=\N{ARABIC-INDIC DIGIT ONE}", r"write name=min:opt:max"),
        ("batch=" + "9" * 5000, r"write name=min:opt:max"),
        ("batch=4:1:1", r"says batch=4:1:1: make it 1 <= min <= opt <= max"),
        ("batch=1:5:4", r"says batch=1:5:4: make it 1 <= min <= opt <= max"),
        ("batch=0:1:4", r"says batch=0:1:4: make it 1 <= min <= opt <= max"),
        ("batch=1:1:9999999999", r"make it 1 <= min <= opt <= max < 2\*\*31"),
        ("batch=1,batch=2", r"names batch twice"),
        ("total=1:2:3", r"total is past \+ sequence: name those"),
        ("features_times_4=4:8:16", r"features_times_4 is 4 \* features: name those"),
    ],
)
def test_a_bad_profile_is_refused_in_one_line(text: str, reason: str) -> None:
    with pytest.raises(EngineError, match=reason) as caught:
        parse_profile(text)
    assert "\n" not in str(caught.value)


SEES = [Port("pixels", (patch_axis(4), 8)), Port("taken", ("spliced", 8))]


def test_patches_follow_from_features_and_a_decoder_takes_all_features() -> None:
    sizes = parse_profile("features=1:64:1024").resolve(SEES)
    assert sizes["features_times_4"] == (4, 256, 4096)
    sizes = Profile().resolve(SEES)
    assert sizes["spliced"][0] == 0 < sizes["features"][2] <= sizes["spliced"][2]
    said = "^profile says up to 9000 features, and the decoder takes up to 4096 spliced: name both$"
    with pytest.raises(EngineError, match=said):
        parse_profile("features=1:64:9000").resolve(SEES)
    assert parse_profile("features=1:64:9000,spliced=0:64:9000").resolve(SEES)["spliced"] == (0, 64, 9000)


def test_a_profile_of_another_export_is_refused(folder: Path) -> None:
    with pytest.raises(EngineError, match=r"names past, rows: this export has the sizes batch, sequence$"):
        engine.build(folder, profile=parse_profile("rows=1,past=0:1:2"))


def test_a_total_that_leaves_int32_is_refused() -> None:
    ports = [Port("mask", ("batch", "total"))]
    sizes = parse_profile("past=0:1:2147483647,sequence=1:1:1")
    with pytest.raises(EngineError, match=r"up to 2147483647 past and 1 sequence: make total less than 2\*\*31"):
        sizes.resolve(ports)


def test_a_dimension_without_default_must_be_named() -> None:
    ports = [Port("x", ("batch", "experts", 8))]
    with pytest.raises(EngineError, match="experts has no default sizes"):
        Profile().resolve(ports)
    assert parse_profile("experts=1:2:4").resolve(ports) == {"batch": (1, 1, 4), "experts": (1, 2, 4)}


def test_a_profile_ends_with_the_table_of_positions() -> None:
    [graph] = read("bert").graphs
    ports, blocks = graph.assembly.inputs, graph.assembly.blocks
    assert Profile().resolve(ports, blocks) == {"batch": (1, 1, 4), "sequence": (1, 64, 320)}
    with pytest.raises(EngineError, match="profile says up to 321 sequence: this model takes 320 at most"):
        parse_profile("sequence=1:8:321").resolve(ports, blocks)


def test_tokens_behind_a_fixed_number_of_others_have_the_sizes_of_both() -> None:
    ports = [Port("mask", ("batch", 1, "sequence", behind(8)), "bool", "mask")]
    assert Profile().resolve(ports)[behind(8)] == (9, 72, 520)
    with pytest.raises(EngineError, match="sequence_and_8 is sequence: name those"):
        parse_profile("sequence_and_8=9:72:520")
