"""A model of two graphs, one of which reads the other's output: its files, its engines, and what may replace them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from arch_cases import CASES, Case
from first_feed import first_feed
from two_graphs import in_two, rebuilt

from llmexport.export import archs, builder, earlier, engine, manifest, onnx_file
from llmexport.export.assembly import named_blocks
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.errors import EngineError, ExportError
from llmexport.export.exported import Export
from llmexport.export.spec import Graph, Model
from llmexport.validate import stages
from llmexport.validate.compare import compare

Exported = Callable[..., Path]


@pytest.fixture(scope="module")
def request_(tiny_checkpoint: Callable[[str], Path]) -> onnx_file.Request:
    return rebuilt("llama", tiny_checkpoint("llama"), in_two)


@pytest.fixture(scope="module")
def export(request_: onnx_file.Request, tmp_path_factory: pytest.TempPathFactory) -> Export:
    return onnx_file.write(request_, tmp_path_factory.mktemp("two") / "out")


def run(path: Path, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    wanted = {i.name: feed[i.name] for i in session.get_inputs()}
    return dict(zip((o.name for o in session.get_outputs()), session.run(None, wanted), strict=True))


def test_each_graph_has_a_file_and_the_weights_lie_there_once(export: Export, exported: Exported) -> None:
    shards = {w.file for w in export.weights}
    assert {p.name for p in export.folder.iterdir()} == {
        *("manifest.json", "embed.onnx", "decoder.onnx", "config.json", "generation_config.json"),
        *shards,
    }
    assert shards == {p.name for p in exported("llama").glob("*.safetensors")}
    described = json.loads((export.folder / "manifest.json").read_text())["graphs"]
    assert list(described) == ["embed", "decoder"]
    assert [s["name"] for s in described["embed"]["steps"]] == ["embedding"]
    assert described["embed"]["carried"] == {}
    assert described["decoder"]["carried"]["past_key_values.0.key"] == "present.0.key"


def test_the_graphs_in_their_order_give_what_the_whole_model_gives(export: Export, exported: Exported) -> None:
    whole = manifest.read(exported("llama"))
    feed = first_feed(whole.graphs[0], stages.prompt(whole))
    expected = run(exported("llama") / "model.onnx", feed)
    embedded = run(export.folder / "embed.onnx", feed)
    found = run(export.folder / "decoder.onnx", {**feed, **embedded})
    assert found.keys() == expected.keys()
    for name in expected:
        assert compare(expected[name], found[name]).max_abs <= 1e-6


def test_a_block_is_called_alike_in_one_graph_and_in_one_of_several() -> None:
    """But where two graphs have the name: test_parts.py."""
    for arch in ("llama", "gemma3_text"):
        whole = onnx_file.read_model(archs.load(arch), archs.load(arch).tiny)
        assert named_blocks(in_two(whole)) == named_blocks(whole)


def test_every_graph_is_built_and_the_record_says_which_plan_is_whose(export: Export, tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    built = engine.build(export.folder, progress=lambda *step: steps.append(step))
    assert [(what, done, of) for what, done, of in steps] == [
        *(("engine: read", 0, 4), ("engine: build", 1, 4), ("engine: read", 2, 4), ("engine: build", 3, 4)),
        ("engine", 4, 4),
    ]
    record = json.loads((export.folder / "engine.json").read_text())
    assert record == json.loads(json.dumps(built.as_data()))
    for name in ("embed", "decoder"):
        plan = (export.folder / f"{name}.plan").read_bytes()
        assert record["graphs"][name]["file"] == f"{name}.plan"
        assert record["graphs"][name]["sha256"] == hashlib.sha256(plan).hexdigest()
    # What --force may replace.
    earlier.check(export.folder, manifest.NAME)


def test_a_profile_names_the_sizes_of_all_graphs(export: Export) -> None:
    ports = [p for g in export.graphs for p in g.assembly.inputs]
    assert engine.Profile().resolve(ports).keys() == {"batch", "sequence", "past", "total"}


@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_what_is_read_back_is_what_was_built(case: Case, exported: Exported, tiny_checkpoint: Exported) -> None:
    config = open_checkpoint(tiny_checkpoint(case)).config
    found = manifest.read(exported(case, "float16"))
    graphs = [(g.name, g.assembly, g.carried) for g in found.graphs]
    model = onnx_file.read_model(archs.choose(None, config), config)
    assert graphs == [(g.name, g.assembly, g.carried) for g in model.graphs]
    assert manifest.from_record(found.folder, manifest.as_data(found)) == dataclasses.replace(found, held={})


def test_a_layer_that_two_graphs_hold_is_one_of_the_checkpoint(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    def twice(model: Model) -> Model:
        [graph] = model.graphs
        assembly = graph.assembly
        outputs = {p.name: f"prompt.{p.name}" for p in assembly.outputs}
        steps = tuple(
            dataclasses.replace(s, outputs=tuple(outputs.get(n, n) for n in s.outputs)) for s in assembly.steps
        )
        given = tuple(dataclasses.replace(p, name=outputs[p.name]) for p in assembly.outputs)
        carried = {past: outputs[present] for past, present in graph.carried.items()}
        first = Graph("prompt", dataclasses.replace(assembly, steps=steps, outputs=given), carried)
        return Model((first, dataclasses.replace(graph, name="step")), model.ties)

    made = onnx_file.write(rebuilt("llama", tiny_checkpoint("llama"), twice), tmp_path / "out")
    assert [g.file for g in made.graphs] == ["prompt.onnx", "step.onnx"]


def test_what_the_builder_says_of_one_of_several_graphs_names_it(
    export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "COMMAND", (sys.executable, "-c", "raise SystemExit(3)"))
    with pytest.raises(EngineError, match=r"^embed: TensorRT's builder ended with exit code 3"):
        engine.build(export.folder)


def test_graphs_of_one_name_or_one_output_are_no_model() -> None:
    [graph] = onnx_file.read_model(archs.load("llama"), archs.load("llama").tiny).graphs
    with pytest.raises(ValueError, match="are called, or give, model"):
        Model((graph, graph), {})
    with pytest.raises(ValueError, match=r"are called, or give, logits, present\.0\.key"):
        Model((graph, dataclasses.replace(graph, name="other")), {})


def test_a_manifest_of_no_graph_is_refused(export: Export, tmp_path: Path) -> None:
    data = manifest.as_data(export) | {"graphs": {}}
    (tmp_path / "manifest.json").write_bytes(manifest.encode(manifest.seal(data)))
    with pytest.raises(ExportError, match=r"manifest\.json is damaged"):
        manifest.read(tmp_path)
