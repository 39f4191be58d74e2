"""What `--part` chooses of a multimodal checkpoint: all of it, its text model, or what sees."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from safetensors.numpy import load_file, save_file

from llmexport.export import archs, export, manifest, onnx_file, random_checkpoint
from llmexport.export.assembly import named_blocks
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.cli.onnx import summary
from llmexport.export.errors import ExportError
from llmexport.export.exported import Export
from llmexport.plugins.dtypes import BY_NAME

TOWERS = [n for n in archs.names() if any(m.tower for m in archs.load(n).multimodal)]
ONE = "llama4"
# One tensor of each tower.
NORM = {"llama4": "vision_model.layernorm_post.weight"}
NORM["gemma3_text"] = "vision_tower.vision_model.post_layernorm.weight"
NORM |= dict.fromkeys(("qwen3_5", "qwen3_5_moe"), "model.visual.merger.norm.weight")
Checkpoint = Callable[[str], Path]
Exporter = Callable[..., Export]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """All of a tiny multimodal checkpoint, in several shards."""

    @functools.cache
    def make(arch: str) -> Path:
        folder = tmp_path_factory.mktemp(arch) / "checkpoint"
        random_checkpoint.write(archs.load(arch), folder, part="all", dtype="float32", shard_bytes=100_000)
        return folder

    return make


@pytest.fixture(scope="module")
def exported_part(tmp_path_factory: pytest.TempPathFactory, checkpoint: Checkpoint) -> Exporter:
    @functools.cache
    def make(arch: str, part: str | None = None, **wanted: Any) -> Export:
        return export(checkpoint(arch), tmp_path_factory.mktemp(arch) / "out", part=part, **wanted)

    return make


def damaged(source: Path, folder: Path, change: Callable[[dict[str, Any], dict[str, np.ndarray]], object]) -> Path:
    """The same checkpoint in one file, after a change of its config and of its tensors."""
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    tensors = {n: t for p in sorted(source.glob("*.safetensors")) for n, t in load_file(p).items()}
    change(config, tensors)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def refusal(folder: Path, out: Path, part: str | None = None) -> str:
    """The one line that says why a checkpoint is not exported."""
    with pytest.raises(ExportError) as error:
        export(folder, out, part=part)
    assert not out.exists()
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def external(found: Export, graph: str) -> dict[str, str]:
    """The file of each weight of a graph."""
    proto = onnx.load(found.folder / f"{graph}.onnx", load_external_data=False).graph
    places = {t.name: {e.key: e.value for e in t.external_data} for t in proto.initializer if t.external_data}
    return {name: place["location"] for name, place in places.items()}


def without_places(path: Path, renamed: dict[str, str]) -> str:
    """A graph as text, but for where in which file its weights lie, with the names that the text model alone has."""
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        tensor.ClearField("external_data")
    text = str(model)
    for ours, theirs in renamed.items():
        text = text.replace(f'"{theirs}', f'"{ours}')
    return text


@pytest.mark.model
@pytest.mark.parametrize("arch", TOWERS)
def test_the_text_part_is_the_text_model_alone(arch: str, exported_part: Exporter, tmp_path: Path) -> None:
    random_checkpoint.write(archs.load(arch), tmp_path / "checkpoint", dtype="float32", shard_bytes=100_000)
    alone, part = export(tmp_path / "checkpoint", tmp_path / "out"), exported_part(arch, "text")
    assert part.renamed
    expected, found = (without_places(e.folder / "model.onnx", dict(part.renamed)) for e in (alone, part))
    assert found == expected
    of_others = {"config", "renamed", "weights", "files", "companions", "inode", "graphs", "manifest_sha256"}
    kept = [{k: v for k, v in manifest.as_data(e).items() if k not in of_others} for e in (alone, part)]
    kept[1]["text_config"] = {**kept[1]["text_config"], **{k: alone.config[k] for k in ("architectures", "dtype")}}
    assert kept[0] == kept[1]
    assert [g.name for g in part.graphs] == ["model"]
    assert part.graphs[0].assembly == alone.graphs[0].assembly


@pytest.mark.model
@pytest.mark.parametrize("arch", TOWERS)
def test_both_graphs_are_written_into_one_folder_where_nobody_says(
    arch: str, exported_part: Exporter, checkpoint: Checkpoint
) -> None:
    found, source = exported_part(arch), checkpoint(arch)
    assert [g.file for g in found.graphs] == ["vision.onnx", "decoder.onnx"]
    assert manifest.as_data(manifest.read(found.folder)) == manifest.as_data(found)
    shards = {p.name for p in source.glob("*.safetensors")}
    written = {"vision.onnx", "decoder.onnx", "manifest.json"}
    assert {p.name for p in found.folder.iterdir()} == shards | written | {*found.companions}
    assert "preprocessor_config.json" in found.companions
    # Each tensor of the checkpoint is read by one of the two, where it lies.
    by_vision, by_decoder = external(found, "vision"), external(found, "decoder")
    assert not by_vision.keys() & by_decoder.keys()
    assert by_vision | by_decoder == {n: t.file for n, t in open_checkpoint(source).tensors.items()}


@pytest.mark.model
@pytest.mark.parametrize("mode", ["link", "copy"])
def test_weights_of_two_graphs_lie_there_once(mode: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    found = export(checkpoint(ONE), tmp_path / "out", weights=mode, digest=True)
    shards = sorted(found.folder.glob("*.safetensors"))
    assert [w.file for w in found.weights] == [p.name for p in shards]
    assert sum(w.bytes for w in found.weights) == sum(p.stat().st_size for p in checkpoint(ONE).glob("*.safetensors"))
    assert [os.path.samefile(p, checkpoint(ONE) / p.name) for p in shards] == [mode == "link"] * len(shards)
    assert all(w.whole_sha256 for w in found.weights)
    # No weight is written into a graph.
    assert sum(p.stat().st_size for p in found.folder.glob("*.onnx")) < 250_000
    assert manifest.verified(found).held == found.held


@pytest.mark.model
def test_verify_reads_the_weights_of_both_graphs(checkpoint: Checkpoint, tmp_path: Path) -> None:
    found = export(checkpoint(ONE), tmp_path / "out", weights="copy", digest=True)
    for file in (external(found, "vision")[NORM[ONE]], external(found, "decoder")["language_model.lm_head.weight"]):
        shutil.copytree(found.folder, tmp_path / file)
        data = bytearray((tmp_path / file / file).read_bytes())
        data[-1] ^= 1
        (tmp_path / file / file).write_bytes(data)
        with pytest.raises(ExportError, match=re.escape(file)):
            manifest.verified(manifest.read(tmp_path / file))


@pytest.mark.model
@pytest.mark.parametrize("arch", TOWERS)
def test_the_vision_part_is_the_same_graph_alone_beside_its_own_weights(
    arch: str, exported_part: Exporter, checkpoint: Checkpoint
) -> None:
    found, both = exported_part(arch, "vision"), exported_part(arch)
    assert (found.folder / "vision.onnx").read_bytes() == (both.folder / "vision.onnx").read_bytes()
    assert found.graphs == both.graphs[:1]
    assert found.reference == both.reference
    used = set(external(found, "vision").values())
    assert used < {p.name for p in checkpoint(arch).glob("*.safetensors")}
    assert {p.name for p in found.folder.iterdir()} == used | {"vision.onnx", "manifest.json", *found.companions}


@pytest.mark.model
@pytest.mark.parametrize("wanted", [{"dtype": "float16"}, {"dtype": "bfloat16"}, {"target": "tensorrt"}], ids=str)
def test_both_graphs_are_in_the_dtype_and_for_the_target_that_is_asked_for(
    wanted: dict[str, str], exported_part: Exporter
) -> None:
    found = exported_part(ONE, **wanted)
    for graph in found.graphs:
        model = onnx.load(found.folder / graph.file, load_external_data=False)
        types = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)}
        ports = (*graph.assembly.inputs, *graph.assembly.outputs)
        assert types == {p.name: BY_NAME[p.typed(found.dtype).dtype].onnx for p in ports}
        assert bool(model.functions) == (found.target == "portable" and bool(graph.ops))


@pytest.mark.model
@pytest.mark.parametrize("arch", TOWERS)
def test_every_block_of_a_part_exports_alone(arch: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    opened = open_checkpoint(checkpoint(arch))
    request = onnx_file.Request(archs.choose(None, opened.config), opened, part="vision")
    made = onnx_file.write_blocks(request, tmp_path / "out")
    assert made.keys() == named_blocks(onnx_file.open_model(request)[1]).keys()
    for name, found in made.items():
        assert found.block == name
        assert manifest.as_data(manifest.read(tmp_path / "out" / name)) == manifest.as_data(found)
        onnxruntime.InferenceSession(found.folder / found.graphs[0].file, providers=["CPUExecutionProvider"])


def names(arch: str, part: str) -> list[str]:
    config = archs.tiny_config(archs.load(arch), "all")
    return list(named_blocks(onnx_file.read_model(archs.choose(None, config), config, part=part)))


@pytest.mark.parametrize("arch", TOWERS)
def test_a_block_is_called_as_in_its_part_alone_and_after_its_graph_where_both_have_the_name(arch: str) -> None:
    text, vision = names(arch, "text"), names(arch, "vision")
    shared = {*text} & {*vision}
    assert {"layer", "norm", "attention"} <= shared
    expected = [f"vision_{n}" if n in shared else n for n in vision]
    expected += [f"decoder_{n}" if n in shared else n for n in [*text, "splice"]]
    assert sorted(names(arch, "all")) == sorted(expected)


def test_the_summary_says_which_graph_makes_what_another_takes(exported_part: Exporter) -> None:
    found = exported_part("llama4")
    rows = dict(summary(found, found.folder))
    assert rows["vision.onnx"] == "pixel_values [tiles, 3, 24, 24] -> image_features [features, 64]"
    assert "image_features [spliced, 64] of vision.onnx -> logits [batch, sequence, 256]" in rows["decoder.onnx"]
    assert "vision: layers.0/gelu" in rows["left unfused"]
    assert "model.onnx" not in dict(summary(exported_part("llama4", "text"), found.folder))


TOO_DEEP = {"gemma3": "num_hidden_layers", "llama4": "num_hidden_layers", "qwen3_5": "depth", "qwen3_5_moe": "depth"}
OTHER_TOWER = {"fullatt_block_indexes": [7], "window_size": 112}  # keys of Qwen2.5-VL's
# What is wrong with a checkpoint, by arch and name of the mistake: a change of its config, one of its tensors, words of
# the line.
Change = Callable[[dict[str, Any]], object]
WRONG: dict[str, tuple[Change, Change, str]] = {
    "no tensors of the tower": (
        lambda c: None,
        lambda t: [t.pop(n) for n in list(t) if n.startswith(("vision_", "multi_modal", "model.visual"))],
        r"holds no vision tower \(.*\*\): pass --part text",
    ),
    "one tensor of the tower is missing": (
        lambda c: None,
        lambda t: [t.pop(n) for n in {*NORM.values()} if n in t],
        r"lacks 1 tensors .*: {norm}\. .*\(--part text leaves the tower out\)$",
    ),
    "one tensor of the tower has another shape": (
        lambda c: None,
        lambda t: t.update({n: np.ones(3, np.float32) for n in {*NORM.values()} if n in t}),
        r"{norm} is \[3\] in the checkpoint.*\(--part text leaves the tower out\)$",
    ),
    "one tensor of the tower has another type": (
        lambda c: None,
        lambda t: t.update({n: t[n].astype(np.int8) for n in {*NORM.values()} if n in t}),
        r"{norm} is stored as I8.*\(--part text leaves the tower out\)$",
    ),
    "one tensor of the tower is not known": (
        lambda c: None,
        lambda t: t.update(
            {n.replace(".weight", ".other"): np.ones(3, np.float32) for n in {*NORM.values()} if n in t}
        ),
        r"holds 1 tensors that this architecture does not use: .*other.*\(--part text leaves the tower out\)$",
    ),
    "the tower is deeper than the checkpoint": (
        lambda c: c["vision_config"].update({TOO_DEEP[c["model_type"]]: 3}),
        lambda t: None,
        r"config\.json says that the tower has layers: 3, the checkpoint holds 2 layers",
    ),
    "vision_config is of another model": (
        lambda c: c["vision_config"].update(OTHER_TOWER),
        lambda t: None,
        r"does not understand: fullatt_block_indexes.*\(of vision_config, which --part text leaves out\)$",
    ),
    "there is no vision_config": (
        lambda c: c.pop("vision_config"),
        lambda t: None,
        r"has no 'vision_config': take the whole checkpoint, or pass --part text$",
    ),
}


@pytest.mark.parametrize("arch", TOWERS)
@pytest.mark.parametrize("mistake", WRONG)
def test_what_is_wrong_with_a_tower_alone_is_said_with_the_way_around_it(
    arch: str, mistake: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    change_config, change_tensors, says = WRONG[mistake]
    folder = damaged(checkpoint(arch), tmp_path / "checkpoint", lambda c, t: (change_config(c), change_tensors(t)))
    line = refusal(folder, tmp_path / "out")
    assert re.search(says.replace("{norm}", re.escape(NORM[arch])), line), line


@pytest.mark.model
def test_the_way_around_a_wrong_tower_leads_to_the_text_model(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for mistake, (change_config, change_tensors, _) in WRONG.items():
        folder = damaged(
            checkpoint(ONE),
            tmp_path / mistake,
            lambda c, t: (change_config(c), change_tensors(t)),  # noqa: B023
        )
        assert export(folder, tmp_path / f"{mistake}-out", part="text").graphs


@pytest.mark.parametrize("part", ["all", "vision"])
def test_a_wrong_text_model_is_not_blamed_on_the_tower(part: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    table = "language_model.model.embed_tokens.weight"
    folder = damaged(checkpoint("llama4"), tmp_path / "checkpoint", lambda c, t: t.pop(table))
    if part == "vision":
        assert export(folder, tmp_path / "out", part=part).graphs
    else:
        assert "--part" not in refusal(folder, tmp_path / "out", part)


@pytest.mark.parametrize("part", ["text", "all", "vision"])
def test_a_tensor_of_no_part_is_refused(part: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    change = {"audio_model.weight": np.zeros(3, np.float32)}
    folder = damaged(checkpoint(ONE), tmp_path / "checkpoint", lambda c, t: t.update(change))
    line = refusal(folder, tmp_path / "out", part)
    assert "holds 1 tensors that this architecture does not use: audio_model.weight" in line
    assert "--part" not in line


def test_a_part_that_there_is_not_is_refused(tmp_path: Path) -> None:
    random_checkpoint.write(archs.load("llama"), tmp_path / "ck")
    with pytest.raises(ExportError, match=r"^--part vision: config\.json is of a text model: leave --part out$"):
        export(tmp_path / "ck", tmp_path / "out", part="vision")
    with pytest.raises(ExportError, match=r"^--part vision: llama has no vision tower here: leave --part out$"):
        export(None, tmp_path / "out", arch="llama", part="vision")
    with pytest.raises(ExportError, match=r"^part is 'tower': choose one of all, text, vision$"):
        export(tmp_path / "ck", tmp_path / "out", part="tower")


@pytest.mark.parametrize("wanted", [{"cache": "static", "max_tokens": 64}, {"logits": "last"}], ids=str)
def test_what_a_tower_does_not_have_is_not_asked_of_it(
    wanted: dict[str, Any], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=r"^--part vision keeps no cache and gives no logits: leave"):
        export(checkpoint(ONE), tmp_path / "out", part="vision", **wanted)


def test_notes_on_the_text_model_are_not_of_the_tower(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Nor is a multimodal checkpoint whose head is its table of words a base model."""

    def tie(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
        del tensors["language_model.lm_head.weight"]

    opened = open_checkpoint(damaged(checkpoint("llama4"), tmp_path / "checkpoint", tie))
    for part in ("all", "text", "vision"):
        request = onnx_file.Request(archs.choose(None, opened.config), opened, part=part)
        assert onnx_file.open_model(request)[2] == []


@pytest.mark.parametrize("part", ["all", "vision"])
def test_the_built_in_part_is_what_transformers_calls_so(part: str) -> None:
    for arch in TOWERS:
        known = archs.load(arch)
        config = archs.tiny_config(known, part)
        assert archs.choose(None, config).name == arch
        assert config["architectures"] == [known.multimodal[0].architecture]


@pytest.mark.model
def test_the_lines_of_the_readme_run_both_graphs(exported_part: Exporter, tmp_path: Path, monkeypatch: Any) -> None:
    text = (Path(__file__).parents[2] / "export" / "README.md").read_text()
    [lines] = re.findall(r"```python\n(import numpy as np, onnxruntime.*?)```", text, re.DOTALL)
    (tmp_path / "OUT").symlink_to(exported_part("llama4").folder)
    monkeypatch.chdir(tmp_path)
    made: dict[str, Any] = {}
    exec(lines, made)
    assert made["logits"].shape == (1, 11, 256)
    blind = made["decoder"].run(None, {**made["feed"], "image_features": 0 * made["features"]})[0]
    assert np.abs(made["logits"] - blind).max() > 0.1
