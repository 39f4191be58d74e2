"""Checkpoints laid out as the published ones are: multimodal, experts in one tensor or many, MXFP4."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from arch_cases import CASES, others_slow
from first_feed import first_feed
from layouts import INDEX, WHOLE, flat, fuse_experts, multimodal, mxfp4, of_another_release, outer
from rungs import EVERYWHERE, OF_A_BLOCK
from safetensors.numpy import load_file, save_file

from llmexport.export import archs, manifest, onnx_file, random_checkpoint
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.errors import ExportError
from llmexport.export.exported import Export
from llmexport.graphs.bodies import op_of
from llmexport.validate import ladder, stages
from llmexport.validate.compare import compare
from llmexport.validate.tolerance import tolerance

pytestmark = [pytest.mark.model, pytest.mark.usefixtures("up_to_onnx_runtime")]

Exporter = Callable[..., Export]
FUSED, MXFP4 = "qwen3_5_moe-fused", "gpt_oss-mxfp4"
OTHER, FLAT = "-of-another-release", "-flat"  # beside a multimodal type
LAYOUTS = [*WHOLE, FUSED, MXFP4]
RENAMED = [kind for kind in WHOLE if outer(kind).other_names]
# One of those whose text model alone is exported, and whose config and names differ from that the most.
AT_ONCE = ["llama4", "qwen3_5_moe", f"qwen2_5_vl{FLAT}", FUSED, MXFP4]
RUNGS = {"PyTorch / transformers", "blocks: ONNX Runtime / PyTorch", "ONNX Runtime / PyTorch"}
TOWERS = (
    "model.vision_tower.",
    "model.embed_vision.",
    "vision_model.",
    "vision_tower.",
    "multi_modal_projector.",
    "model.visual.",
    "visual.",
)
BLOCKS = {
    "llama4": ["attention", "temperature", "mask_chunk_8", "layers_3_self_attn", "router", "experts", "shared_expert"],
    "qwen3_5_moe": ["gated_delta_net", "causal_conv", "gated_norm", "presence", "attention", "router", "experts"],
    FUSED: ["experts", "moe"],
    MXFP4: ["attention", "span", "router", "experts", "moe"],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny checkpoint in this layout."""

    @functools.cache
    def make(layout: str) -> Path:
        folder = tmp_path_factory.mktemp(layout) / "checkpoint"
        if layout == MXFP4:
            return mxfp4(folder)
        if layout == FUSED:
            return fuse_experts(make("qwen3_5_moe"), folder)
        kind, changed, how = layout.partition("-")
        if not changed:
            return multimodal(kind, folder)
        return flat(make(kind), folder) if changed + how == FLAT else of_another_release(make(kind), folder, kind)

    return make


@pytest.fixture(scope="module")
def exported_layout(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str], Path]) -> Exporter:
    """The export of a layout; `exported_layout(layout, dtype="float16", block="moe")`."""

    @functools.cache
    def make(layout: str, **wanted: str) -> Export:
        return export(checkpoint(layout), tmp_path_factory.mktemp(layout) / "export", **wanted)

    return make


def export(source: Path, folder: Path, **wanted: str) -> Export:
    """The text model of a checkpoint."""
    opened = open_checkpoint(source)
    request = onnx_file.Request(archs.choose(None, opened.config), opened, part="text", **wanted)
    onnx_file.write(request, folder, force=False)
    return manifest.read(folder)


def statuses(found: Export) -> dict[str, str]:
    return {r.name: r.status for r in ladder.climb(found, rungs=OF_A_BLOCK if found.block else EVERYWHERE).rungs}


def prompt() -> stages.Stage:
    return stages.opening(np.random.default_rng(0).integers(0, 256, (1, 37)), np.ones((1, 37), np.int64))


def logits(found: Export) -> np.ndarray:
    session = onnxruntime.InferenceSession(found.folder / "model.onnx", providers=["CPUExecutionProvider"])
    return session.run(["logits"], first_feed(found.graphs[0], prompt()))[0]


def graph(found: Export) -> onnx.GraphProto:
    return onnx.load(found.folder / "model.onnx", load_external_data=False).graph


def external(found: Export) -> dict[str, onnx.TensorProto]:
    """The weights of the graph, by name."""
    return {t.name: t for t in graph(found).initializer if t.external_data}


@pytest.mark.parametrize("layout", others_slow([*LAYOUTS, f"qwen2_5_vl{FLAT}", f"gemma3{OTHER}"], AT_ONCE))
def test_every_rung_of_a_published_layout_passes(layout: str, exported_layout: Exporter) -> None:
    assert statuses(exported_layout(layout)) == dict.fromkeys(RUNGS, "pass")


@pytest.mark.parametrize(("layout", "block"), [(n, b) for n, blocks in BLOCKS.items() for b in blocks])
def test_a_block_of_a_published_layout_exports_alone(layout: str, block: str, exported_layout: Exporter) -> None:
    found = exported_layout(layout, block=block)
    assert found.block == block
    assert statuses(found) == {"ONNX Runtime / PyTorch": "pass"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_export_adds_no_weight_bytes(
    layout: str, checkpoint: Callable[[str], Path], exported_layout: Exporter
) -> None:
    source, found = checkpoint(layout), exported_layout(layout)
    used = {e.value for t in external(found).values() for e in t.external_data if e.key == "location"}
    assert used == {p.name for p in found.folder.glob("*.safetensors")}
    assert all(os.path.samefile(source / file, found.folder / file) for file in used)
    assert sum(p.stat().st_size for p in found.folder.iterdir() if p.stat().st_nlink == 1) < 1_000_000
    # Constants of a few numbers are the graph's own: shapes, norms' ones, RoPE's steps.
    assert sum(t.ByteSize() for t in graph(found).initializer if not t.external_data) < 10_000


@pytest.mark.parametrize("layout", [*WHOLE, *(f"{k}{FLAT}" for k in WHOLE if outer(k).flat)])
def test_logits_are_those_of_the_multimodal_model_itself(
    layout: str, checkpoint: Callable[[str], Path], exported_layout: Exporter
) -> None:
    """Not of the text model alone, which the ladder loads."""
    found = exported_layout(layout)
    [architecture] = found.config["architectures"]
    model = getattr(transformers, architecture).from_pretrained(checkpoint(layout), attn_implementation="eager").eval()
    with torch.no_grad():
        expected = model(torch.from_numpy(prompt().ids)).logits.numpy()
    difference = compare(expected, logits(found))
    assert difference.excess(tolerance("float32", found)) <= 1
    assert difference.scale > 0.5, "logits near zero would prove nothing"


@pytest.mark.parametrize("layout", WHOLE)
def test_an_export_has_the_weights_of_the_text_model_alone(
    layout: str, checkpoint: Callable[[str], Path], exported_layout: Exporter
) -> None:
    stored = open_checkpoint(checkpoint(layout)).tensors
    vision = {n for n in stored if n.startswith(TOWERS)}
    assert vision
    assert external(exported_layout(layout)).keys() == stored.keys() - vision


@pytest.mark.parametrize("layout", WHOLE)
def test_a_tensor_of_another_tower_is_refused(layout: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source, folder = checkpoint(layout), tmp_path / "checkpoint"
    folder.mkdir()
    tensors = {n: t for p in sorted(source.glob("*.safetensors")) for n, t in load_file(p).items()}
    save_file(tensors | {"audio_model.weight": np.zeros(3, np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(ExportError, match=r"holds 1 tensors that this architecture does not use: audio_model\.weight"):
        export(folder, tmp_path / "out")


@pytest.mark.parametrize("kind", RENAMED)
def test_the_names_of_another_release_are_the_same_model(kind: str, exported_layout: Exporter) -> None:
    one, other = exported_layout(kind), exported_layout(f"{kind}{OTHER}")
    assert {n for n in external(other) if n.startswith("model.language_model.")}
    assert np.array_equal(logits(one), logits(other))


@pytest.mark.parametrize("kind", [k for k in WHOLE if outer(k).flat])
def test_keys_at_the_top_of_a_config_are_the_same_model(kind: str, exported_layout: Exporter) -> None:
    """Those of the text model, and mRoPE by the name that it had then."""
    one, other = exported_layout(kind), exported_layout(f"{kind}{FLAT}")
    assert "text_config" not in other.config
    assert one.graphs[0].assembly == other.graphs[0].assembly
    assert np.array_equal(logits(one), logits(other))


@pytest.mark.parametrize("kind", [k for k in WHOLE if not outer(k).tower])
def test_a_tower_that_is_not_exported_is_noted_as_left_out(kind: str, exported_layout: Exporter) -> None:
    [note] = exported_layout(kind).notes
    assert note.startswith(f"{kind}: the text model alone is exported, {outer(kind).left_out[0]}")
    assert note.endswith("left out: it takes no pictures")


def test_experts_in_one_tensor_equal_experts_one_by_one(
    checkpoint: Callable[[str], Path], exported_layout: Exporter
) -> None:
    one, many = (external(exported_layout(layout)) for layout in (FUSED, "qwen3_5_moe"))
    start = "model.language_model.layers.0.mlp.experts."
    assert {n.removeprefix(start) for n in one if n.startswith(start)} == {"gate_up_proj", "down_proj"}
    # Eight experts of three matrices.
    assert sum(n.startswith(start) for n in many) == 24
    difference = compare(*(logits(exported_layout(layout)) for layout in ("qwen3_5_moe", FUSED)))
    # The same numbers by the same operators.
    assert (difference.max_abs, difference.rms_ratio) == (0, 0)
    assert difference.scale > 0.5


def test_experts_in_four_bits_stay_bytes_in_the_graph(
    checkpoint: Callable[[str], Path], exported_layout: Exporter
) -> None:
    found = exported_layout(MXFP4)
    model = graph(found)
    stored = open_checkpoint(checkpoint(MXFP4)).tensors
    packed = {n: t for n, t in stored.items() if n.endswith(("_blocks", "_scales"))}
    assert len(packed) == 4 * found.config["num_hidden_layers"]
    weights = external(found)
    assert {weights[n].data_type for n in packed} == {onnx.TensorProto.UINT8}
    readers = [(op_of(n), i) for n in model.node for i in n.input if i in packed]
    assert sorted(readers) == sorted(("MoeExperts", n) for n in packed)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_experts_in_four_bits_equal_transformers_in_16_bits(dtype: str, exported_layout: Exporter) -> None:
    found = statuses(exported_layout(MXFP4, dtype=dtype))
    runs = "pass" if dtype == "float16" else "not run"
    assert found == {
        "PyTorch / transformers": "pass",
        "PyTorch / transformers, float32": "pass",
        "blocks: ONNX Runtime / PyTorch": runs,
        "ONNX Runtime / PyTorch": runs,
    }


@pytest.mark.parametrize("left_out", ["_blocks", "_scales"])
def test_four_bits_without_their_scales_or_scales_without_bits_are_refused(
    left_out: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source, folder = checkpoint(MXFP4), tmp_path / "checkpoint"
    folder.mkdir()
    tensors = {n: t for p in sorted(source.glob("*.safetensors")) for n, t in load_file(p).items()}
    missing = f"model.layers.1.mlp.experts.down_proj{left_out}"
    del tensors[missing]
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(ExportError, match=f"lacks 1 tensors that its config.json asks for: {missing}"):
        export(folder, tmp_path / "out")


def test_published_keys_of_layers_that_read_others_are_passed_over(tmp_path: Path) -> None:
    """Gemma 4 E2B and E4B hold a projection and a norm of keys for all layers, those too that have none."""
    named, case = archs.load("gemma4_text"), next(c for c in CASES if c.name == "gemma4_text-shared-keys")
    config = {**named.tiny, **case.changes, "architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text"}
    random_checkpoint.write(named, tmp_path / "checkpoint", config=config)
    before = export(tmp_path / "checkpoint", tmp_path / "before")
    own = [f"model.layers.4.self_attn.{n}.weight" for n in ("k_proj", "v_proj", "k_norm")]
    save_file(
        {n: np.ones((64, 64), np.float32) for n in own}, tmp_path / "checkpoint" / "model-00002-of-00002.safetensors"
    )
    index = tmp_path / "checkpoint" / INDEX
    listed = json.loads(index.read_text())
    listed["weight_map"] |= dict.fromkeys(own, "model-00002-of-00002.safetensors")
    index.write_text(json.dumps(listed))
    after = export(tmp_path / "checkpoint", tmp_path / "after")
    assert external(after).keys() == external(before).keys()
    assert np.array_equal(logits(after), logits(before))


@pytest.mark.parametrize("arch", ["llama4", "mixtral", "qwen2_moe"])
def test_experts_in_bf16_stay_so_in_an_fp32_graph(arch: str, tmp_path: Path) -> None:
    """They are most of the model: a runtime that folded their Casts would double its memory."""
    random_checkpoint.write(archs.load(arch), tmp_path / "checkpoint", dtype="bfloat16", shard_bytes=100_000)
    found = export(tmp_path / "checkpoint", tmp_path / "out")
    weights, model = external(found), graph(found)
    assert {t.data_type for t in weights.values()} == {onnx.TensorProto.BFLOAT16}
    turned = {n.output[0]: n.input[0] for n in model.node if n.op_type in ("Transpose", "Gather")}
    cast = {turned.get(i, i) for n in model.node if n.op_type == "Cast" for i in n.input}
    experts = {n for n in weights if ".experts." in n}
    assert experts
    # Neither a matrix of one expert nor a stack of them all.
    assert not {n for n in cast if ".experts." in n}
    assert weights.keys() - experts <= cast
    assert statuses(found) == dict.fromkeys(RUNGS, "pass")


@pytest.mark.parametrize("arch", ["mixtral", "qwen2_moe", "qwen3_5_moe"])
def test_files_of_experts_one_by_one_are_linked(arch: str, tiny_checkpoint, exported) -> None:
    source, folder = tiny_checkpoint(arch), exported(arch)
    found = manifest.read(folder)
    parts = {
        n for names in found.graphs[0].step_weights["layers.0"].values() if isinstance(names, tuple) for n in names
    }
    assert len(parts) == 3 * len(experts_of(found))
    assert parts <= external(found).keys()
    assert all(os.path.samefile(p, folder / p.name) for p in source.glob("*.safetensors"))
    assert sum(p.stat().st_size for p in folder.iterdir() if p.stat().st_nlink == 1) < 1_000_000


def experts_of(found: Export) -> range:
    config = found.config
    return range(config.get("num_experts") or config["num_local_experts"])
