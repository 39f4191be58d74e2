"""Vision towers against transformers, which loads the same folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from arch_cases import TOWERS, Case
from onnx.helper import get_node_attr_value
from reseal import reseal
from safetensors.numpy import load_file, save_file
from towers import PACKED, RUNNERS, WIDE, check, pixels, reference, run_only, seen

from llmexport.export import archs, export, manifest, random_checkpoint
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.multimodal import of_release
from llmexport.export.onnx_file import Request, write
from llmexport.export.spec import Layer
from llmexport.validate import validate
from llmexport.validate.compare import compare
from llmexport.validate.runners import not_runnable
from llmexport.validate.tolerance import TOLERANCE

pytestmark = pytest.mark.model

# Time, height and width of each picture, in features.
GRIDS = {
    "one": [[1, 4, 3]],
    "three of three sizes": [[1, 4, 3], [1, 1, 1], [1, 2, 6]],
    "a video of four frames": [[4, 2, 3]],
    "an image and a video": [[1, 3, 2], [3, 4, 5]],
    "the smallest": [[1, 1, 1]],
    "thin ones": [[1, 1, 20], [1, 20, 1]],
}
TILES = (1, 5)
SEEN = [
    *((case, name) for case in (*PACKED, WIDE[0]) for name in GRIDS),
    *((case, tiles) for case in (*(c for c in TOWERS if c not in PACKED), *WIDE[1:]) for tiles in TILES),
]


def shown(case: Case, folder, which: str | int) -> dict[str, np.ndarray]:
    if isinstance(which, int):
        return pixels(folder, which)
    merge = reference(folder).config.vision_config.spatial_merge_size
    return pixels(folder, np.array(GRIDS[which]) * (1, merge, merge))


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize(("case", "which"), SEEN, ids=str)
def test_features_match_transformers(case: Case, which: str | int, runner: str, tiny_checkpoint, exported) -> None:
    folder = tiny_checkpoint(case, "all")
    feed = shown(case, folder, which)
    found = run_only(exported(case, part="vision"), runner, feed)["image_features"]
    check(seen(reference(folder), feed), found)


@pytest.mark.parametrize(("case", "which"), SEEN, ids=str)
def test_features_of_what_onnx_runtime_is_given_match_transformers(
    case: Case, which: str | int, tiny_checkpoint, exported
) -> None:
    folder = exported(case, part="vision", target="onnxruntime")
    feed = shown(case, tiny_checkpoint(case, "all"), which)
    check(seen(reference(tiny_checkpoint(case, "all")), feed), run_only(folder, "onnxruntime", feed)["image_features"])
    [graph] = manifest.read(folder).graphs
    whole = graph.fusions["lower_whole_attention"]
    layers = sum(isinstance(s.block, Layer) for s in graph.assembly.steps)
    assert (whole.count, whole.refused) == (layers, [])


def test_a_fault_in_attention_by_segments_is_found(tiny_checkpoint, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint("qwen3_5", "all"))
    request = Request(archs.choose(None, checkpoint.config), checkpoint, target="onnxruntime", part="all")
    folder = write(request, tmp_path / "out").folder
    model = onnx.load(folder / "vision.onnx", load_external_data=False)
    for node in (n for n in model.graph.node if n.name.endswith("attention/segments")):
        [loop] = [n for n in get_node_attr_value(node, "then_branch").node if n.op_type == "Loop"]
        [attend] = [n for n in get_node_attr_value(loop, "body").node if n.op_type == "MultiHeadAttention"]
        next(a for a in attend.attribute if a.name == "scale").f *= 1.5
    onnx.save(model, folder / "vision.onnx")
    reseal(folder)
    assert [r.status for r in validate(folder, rungs=["blocks", "onnxruntime"]).rungs] == ["fail", "fail"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", [PACKED[0], *(c for c in TOWERS if c not in PACKED)], ids=str)
def test_features_in_16_bits_are_as_near_to_fp32_as_those_of_transformers(
    case: Case, dtype: str, tiny_checkpoint, exported
) -> None:
    folder = tiny_checkpoint(case, "all")
    feed = shown(case, folder, "three of three sizes" if case in PACKED else 5)
    exact = seen(reference(folder), feed)
    bound = TOLERANCE[dtype].widened(compare(exact, seen(reference(folder, getattr(torch, dtype)), feed)))
    for runner in RUNNERS:
        if runner == "torch" or not not_runnable(dtype):
            found = run_only(exported(case, dtype, part="vision"), runner, feed)["image_features"]
            check(exact, found.astype(np.float32), bound)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("case", PACKED[:1], ids=str)
def test_a_grid_of_fewer_patches_than_there_are_fails(case: Case, runner: str, tiny_checkpoint, exported) -> None:
    feed = shown(case, tiny_checkpoint(case, "all"), "one")
    with pytest.raises(Exception, match=r"out of|idx"):
        run_only(exported(case, part="vision"), runner, feed | {"grid_thw": np.array([[1, 8, 4]])})


RELEASES = archs.load("gemma3_text").multimodal[0].tower.other_names


@pytest.mark.parametrize("starts", RELEASES, ids=lambda starts: next(iter(starts.values())))
def test_the_names_of_another_release_are_the_same_tower(starts: dict[str, str], tmp_path: Path) -> None:
    """The published names, and those that transformers has saved since: it loads them all."""
    source, folder = tmp_path / "published", tmp_path / "checkpoint"
    random_checkpoint.write(archs.load("gemma3_text"), source, dtype="float32", part="all")
    [shard] = source.glob("*.safetensors")
    later = any(to.startswith("model.") for to in starts.values())
    text = {"language_model.model.": "model.language_model."} if later else {}
    folder.mkdir()
    renamed = {of_release(n, {**starts, **text}): t for n, t in load_file(shard).items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    assert {n.partition(".layers.")[0] for n in renamed} != {n.partition(".layers.")[0] for n in load_file(shard)}
    feed = pixels(folder, 2)
    for part in ("vision", "all"):
        export(folder, tmp_path / part, part=part)
        found = run_only(tmp_path / part, "onnxruntime", feed)["image_features"]
        check(seen(reference(folder), feed), found)
    assert np.array_equal(
        found, run_only(export(source, tmp_path / "out").folder, "onnxruntime", feed)["image_features"]
    )
