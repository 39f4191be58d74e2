"""Engines in which our ops are our plugins: a real builder, no GPU.

The builder asks plugins for shapes, types and formats, and runs none: the emulated library answers as the one of nvcc
does. Each architecture is built in one dtype, the first families in each; those by the one and the others by the other.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import onnx
import pytest
from arch_cases import FIRST_EVERY_TIME, MATRIX, ONCE, PRIMARY, TOWERS, Case, in_each_dtype, others_slow
from engine_folder import of_engine
from native import emulated_library

from llmexport.export import engine, engine_job, engine_record, manifest, onnx_file
from llmexport.export.errors import EngineError
from llmexport.export.spec import DTYPES

pytestmark = pytest.mark.engine

EMULATED = [e for e in in_each_dtype(FIRST_EVERY_TIME) if e in ONCE or e[0].arch in PRIMARY]


@pytest.fixture
def copy(exported, tmp_path: Path) -> Path:
    """An export that a test may add an engine to."""
    return Path(shutil.copytree(exported("llama", "float16"), tmp_path / "export"))


@pytest.mark.parametrize(("case", "dtype"), [e for e in ONCE if e not in EMULATED or e[0].arch in PRIMARY], ids=str)
def test_every_op_of_ours_is_a_plugin_layer(
    case: Case, dtype: str, exported, cuda_library: Path, tmp_path: Path
) -> None:
    check_layers(exported(case, dtype), cuda_library, tmp_path)


@pytest.mark.parametrize(("case", "dtype"), others_slow(EMULATED, ONCE), ids=str)
def test_every_op_of_ours_is_a_plugin_layer_of_the_emulated_library(
    case: Case, dtype: str, exported, tmp_path: Path
) -> None:
    check_layers(exported(case, dtype), emulated_library(), tmp_path)


@pytest.mark.parametrize(
    ("case", "dtype"), others_slow([(c, d) for c in TOWERS for d in DTYPES], [(TOWERS[0], "float16")]), ids=str
)
def test_every_op_of_ours_is_a_plugin_layer_of_either_graph(case: Case, dtype: str, exported, tmp_path: Path) -> None:
    check_layers(exported(case, dtype, part="all"), emulated_library(), tmp_path)


def check_layers(export: Path, library: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(export, tmp_path / "export"))
    record = engine.build(folder, plugins=library)
    graphs = manifest.read(folder).graphs
    for graph in graphs:
        plan = record.graphs[graph.name]
        ops = of_engine(graph.ops, plan.plugins)
        assert plan.plugins == ops
        assert plan.layers.get("PLUGIN_V3", 0) == sum(ops.values())
        assert not [m for m in plan.messages if "Unused Input" in m]
        assert len([k for k in plan.kernels or () if k.kind == "plugin"]) == sum(ops.values())
    used = engine_record.Library(str(library), hashlib.sha256(library.read_bytes()).hexdigest())
    assert record.plugins == ((used,) if any(g.ops for g in graphs) else ())
    assert json.loads((folder / "engine.json").read_text()) == json.loads(json.dumps(record.as_data()))


def test_without_plugins_the_bodies_are_built(copy: Path) -> None:
    record = engine.build(copy, plugins=None)
    assert record.plugins == ()
    assert "PLUGIN_V3" not in record.graphs["model"].layers


def test_ops_that_the_library_does_not_serve_are_built_from_their_bodies(copy: Path, monkeypatch) -> None:
    library = emulated_library()
    monkeypatch.setattr(engine.library, "served", lambda path: frozenset({"Rope"}))
    record = engine.build(copy, plugins=library)
    assert record.graphs["model"].plugins == {"Rope": 6}
    assert record.graphs["model"].layers["PLUGIN_V3"] == 6


def test_an_op_that_does_not_become_a_plugin_layer_is_an_error(copy: Path, monkeypatch) -> None:
    """The engine would run, by another kernel than engine.json says."""
    library = emulated_library()
    original = engine_job.tensorrt_form

    def one_more(*arguments):
        model, nodes = original(*arguments)
        return model, {**nodes, "ghost": "Rope"}

    monkeypatch.setattr(engine_job, "tensorrt_form", one_more)
    with pytest.raises(EngineError, match="12 plugin layers of 13 ops, see ghost"):
        engine.build(copy, plugins=library)
    assert not (copy / "model.plan").exists()


@pytest.mark.parametrize(
    ("arch", "dtype", "layers"),
    [("gemma", "float16", 3), pytest.param("qwen3_5_moe", "float32", 1, marks=pytest.mark.slow)],
)
def test_an_op_that_writes_a_cache_in_place_is_one_layer_of_an_engine(
    arch: str, dtype: str, layers: int, exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of TensorRT's own for that is left; without its preview it refuses the plugin."""
    folder = Path(shutil.copytree(exported(arch, dtype, slots=64, cache="static-fused"), tmp_path / "export"))
    record = engine.build(folder, plugins=emulated_library()).graphs["model"]
    assert record.plugins == of_engine(manifest.read(folder).graphs[0].ops, record.plugins)
    assert record.plugins["QkNormRopeWrite"] == layers
    assert record.layers["PLUGIN_V3"] == sum(record.plugins.values())
    assert "KV_CACHE_UPDATE" not in record.layers
    if arch == "gemma":
        monkeypatch.setattr(engine_job, "declared", list)
        with pytest.raises(EngineError, match="ALIASED_PLUGIN_IO"):
            engine.build(folder, plugins=emulated_library())


@pytest.mark.parametrize("weights", ["inside", "beside"])
def test_experts_are_normed_wherever_their_weights_lie(weights: str, exported) -> None:
    export, library = manifest.read(exported("gpt_oss", "float16")), emulated_library()
    served = engine.library.served(library)
    job = engine_job.prepare(export, export.graphs[0], "tensorrt_rtx", library, served, weights)
    kinds = Counter(job.nodes.values())
    assert (kinds["NormedMoeExperts"], kinds["MoeExperts"], kinds["AddRmsNorm"]) == (3, 0, 0)
    assert job.launches["layers.0/moe_experts"] == 3


@pytest.mark.parametrize(
    ("arch", "inside", "beside"),
    [
        ("gpt_oss", "NormedMoeRoute", "NormedMoeRoute"),
        ("glm4_moe", "NormedSharedMoeRoute", "NormedMoeRoute"),
        pytest.param("qwen3_5_moe", "NormedGatedSharedMoeRoute", "NormedMoeRoute", marks=pytest.mark.slow),
        pytest.param("deepseek_v3", "NormedSharedMoeRoute", "NormedMoeRoute", marks=pytest.mark.slow),
    ],
)
def test_routers_of_published_types_are_normed_and_multiplied_wherever_their_weights_lie(
    arch: str, inside: str, beside: str, exported_as_stored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A router's weight is an input of its own where it is large enough, as here all are."""
    monkeypatch.setattr(engine_job.beside, "LARGE", MATRIX // 8)
    folder = Path(shutil.copytree(exported_as_stored(arch), tmp_path / "export"))
    [graph] = manifest.read(folder).graphs
    for weights, route in (("inside", inside), ("beside", beside)):
        record = engine.build(folder, plugins=emulated_library(), weights=weights).graphs["model"]
        assert record.plugins == of_engine(graph.ops, record.plugins)
        assert record.plugins[route] == graph.ops["MoeRoute"]
        routing = [k for k in record.kernels or () if k.kind == "plugin" and "moe_route" in k.name]
        assert [k.launches for k in routing] == [1] * graph.ops["MoeRoute"]
    assert [n for n in record.bindings if re.search(r"(gate|router)\.weight", n)]


@pytest.mark.slow
def test_without_plugins_its_body_is_tensorrts_own(exported, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported("gemma", "float16", slots=64, cache="static-fused"), tmp_path / "export"))
    record = engine.build(folder, plugins=None).graphs["model"]
    assert (record.layers["KV_CACHE_UPDATE"], "PLUGIN_V3" in record.layers) == (6, False)


@pytest.mark.parametrize(
    ("arch", "ops"),
    [
        ("gemma", {"QkNormRope", "AddRmsNorm", "GatedAct"}),
        ("qwen3_5", {"QkNormRope", "AddRmsNorm", "GatedAct", "GatedDeltaNet"}),
    ],
)
def test_the_form_for_trtexec_has_no_bodies_and_builds(
    arch: str, ops: set[str], tiny_checkpoint, tmp_path: Path
) -> None:
    from llmexport.export import archs
    from llmexport.export.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(tiny_checkpoint(arch))
    request = onnx_file.Request(archs.load(arch), checkpoint, "float16", target="tensorrt")
    onnx_file.write(request, tmp_path / "export", force=False)
    model = onnx.load(tmp_path / "export" / "model.onnx", load_external_data=False)
    assert not model.functions
    assert {n.op_type for n in model.graph.node if n.domain == "llmexport"} == ops
    record = engine.build(tmp_path / "export", plugins=emulated_library())
    assert record.graphs["model"].plugins == manifest.read(tmp_path / "export").graphs[0].ops


def test_the_form_for_trtexec_can_be_validated_too(tiny_checkpoint, tmp_path: Path) -> None:
    from llmexport.export import archs
    from llmexport.export.checkpoint import open_checkpoint
    from llmexport.validate import ladder

    checkpoint = open_checkpoint(tiny_checkpoint("gpt_oss"))
    request = onnx_file.Request(archs.load("gpt_oss"), checkpoint, target="tensorrt")
    onnx_file.write(request, tmp_path / "export", force=False)
    model = onnx.load(tmp_path / "export" / "model.onnx", load_external_data=False)
    versions = {n.op_type: a.s for n in model.graph.node for a in n.attribute if a.name == "plugin_version"}
    assert versions == {"SinkAttention": b"2"}
    assert ladder.climb(manifest.read(tmp_path / "export")).passed
