"""Exports that see are run on pictures among their tokens, and what is wrong with them is found where it is."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from arch_cases import TOWERS, Case
from reseal import reseal
from rungs import EVERYWHERE
from towers import PACKED, reference

from llmexport.export import manifest
from llmexport.export.spec import Assembly, PatchPlaces, Splice
from llmexport.export.trace import torch_dtype
from llmexport.validate import drive, feeds, golden, ladder, pack, pictures, replay, stages, thresholds
from llmexport.validate.compare import Mismatch
from llmexport.validate.deployed import _onnx_runtime
from llmexport.validate.pictures import Pictures, patch_places, sight
from llmexport.validate.runners import to_numpy, to_torch

pytestmark = [pytest.mark.model, pytest.mark.usefixtures("up_to_onnx_runtime")]

PACKED_ROW, TILED = PACKED[0], next(c for c in TOWERS if c not in PACKED)
MUTUAL = next(c for c in TOWERS if c.arch == "gemma3_text")  # tokens of a picture see each other
ONE_EACH = (PACKED_ROW, TILED, MUTUAL)
BLOCKS, FILE = "blocks: ONNX Runtime / PyTorch", "ONNX Runtime / PyTorch"


def climb(folder: Path, **options: Any) -> dict[str, ladder.Rung]:
    report = ladder.climb(manifest.read(folder), **{"rungs": EVERYWHERE, **options})
    return {r.name: r for r in report.rungs}


@pytest.mark.parametrize("case", TOWERS, ids=str)
def test_a_prompt_has_pictures_in_every_row_and_text_around_them(case: Case, exported) -> None:
    export = manifest.read(exported(case, part="all"))
    seen, stage = sight(export.blocks), stages.prompt(export)
    assert seen
    assert stage.pictures
    visual = np.isin(stage.ids, seen.tokens)
    assert visual.sum() == sum(seen.runs(stage.pictures))
    assert not visual[~stage.real].any()
    for row in visual:
        first, last = np.flatnonzero(row)[[0, -1]]
        assert first >= stages.PIECE
        assert len(row) - 1 - last > 64
    # Text parts at least two pictures of the first row.
    assert np.diff(visual[0].astype(int)).clip(0).sum() >= 2
    again = stages.prompt(export).pictures
    assert again
    assert np.array_equal(again.pixels, stage.pictures.pixels)
    other = stages.prompt(export, seed=1).pictures
    assert other
    assert not np.array_equal(other.pixels, stage.pictures.pixels)


def test_no_token_of_a_picture_is_drawn_or_chosen(exported) -> None:
    """Nearly all words are made such tokens."""
    export = manifest.read(exported(PACKED_ROW, part="all"))
    few = dataclasses.replace(next(b for b in export.blocks if isinstance(b, Splice)), tokens=tuple(range(3, 250)))
    changed = [dataclasses.replace(g, assembly=without(g.assembly, few)) for g in export.graphs]
    export = dataclasses.replace(export, graphs=tuple(changed))
    with drive.in_torch(export) as model:
        prompt = stages.opening(np.array([[0, 255, 1]]), np.ones((1, 3), np.int64))
        script, _, _ = drive.record(model, prompt)
    assert [s.kind for s in script].count("decode") == stages.DECODE_STEPS
    ids = np.concatenate([s.ids.ravel() for s in (*script, stages.crossing(export, 30))])
    assert not np.isin(ids, few.tokens).any()


def without(assembly: Assembly, few: Splice) -> Assembly:
    """The same, with another splice."""
    steps = (dataclasses.replace(s, block=few) if isinstance(s.block, Splice) else s for s in assembly.steps)
    return dataclasses.replace(assembly, steps=tuple(steps))


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_positions_of_a_prompt_are_those_of_transformers(case: Case, exported, tiny_checkpoint) -> None:
    export = manifest.read(exported(case, part="all"))
    seen, stage = sight(export.blocks), stages.prompt(export, batch=3)
    assert seen
    assert stage.pictures
    assert stage.pictures.grids is not None
    kinds = np.select([stage.ids == t for t in seen.tokens], [1, 2], 0)
    given = pictures.stands_for(seen, stage.ids, stage.pictures)
    grids = [to_torch(stage.pictures.grids[np.array(given) == token]) for token in seen.tokens]
    model = reference(tiny_checkpoint(case, "all")).model
    expected, deltas = model.get_rope_index(
        to_torch(stage.ids), to_torch(kinds), *grids, attention_mask=to_torch(stage.mask)
    )
    assert np.array_equal(stage.positions, expected.numpy())
    step = stage.then("decode", "decode", stage.ids[:, :1])
    assert np.array_equal(step.positions, stage.mask.sum(1, keepdims=True) + deltas.numpy())


@pytest.mark.parametrize("merge", [1, 2, 3])
def test_places_of_patches_are_those_of_the_block(merge: int) -> None:
    from llmexport.export import blocks

    grids = np.array([(1, 4, 3), (2, 2, 3), (1, 1, 1)]) * (1, merge, merge)
    block = PatchPlaces(merge, 5, "patches")
    pixels = np.zeros((int(grids.prod(1).sum()), 5), np.float32)
    made = blocks.module(block, torch_dtype("float32"))(to_torch(pixels), to_torch(grids))
    for found, expected in zip(patch_places(grids, merge), made, strict=True):
        assert np.array_equal(found, to_numpy(expected))


@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_what_is_drawn_for_a_block_is_within_what_it_takes(case: Case, exported) -> None:
    export = manifest.read(exported(case, part="all"))
    [splice] = [b for b in export.blocks if isinstance(b, Splice)]
    for block in export.blocks:
        for sizes in thresholds.block_sizes(block):
            feed = feeds.block_feed(block, "float32", sizes)
            by_use = {p.use: feed[p.name] for p in block.inputs}
            if "grid" in by_use:
                assert by_use["grid"].prod(1).sum() == len(by_use["pixels"])
                assert (by_use["grid"] > 0).all()
            if "extents" in by_use:
                assert (by_use["places"] < by_use["extents"]).all()
            if block == splice:
                assert 0 < np.isin(by_use["tokens"], splice.tokens).sum() <= len(by_use["features"])


IN_ALL = [
    (case, dtype, slots, part)
    for case in TOWERS
    for dtype in ("float32", "float16", "bfloat16")
    for slots, part in ((None, "all"), (128, "all"), (None, "vision"))
]
AT_ONCE = [
    (PACKED_ROW, "float32", None, "all"),
    (TILED, "float32", None, "vision"),
    (TILED, "float16", 128, "all"),
    (MUTUAL, "float32", None, "all"),
    (MUTUAL, "float32", 128, "all"),
]


@pytest.mark.parametrize(
    ("case", "dtype", "slots", "part"),
    [pytest.param(*p, marks=() if p in AT_ONCE else pytest.mark.slow) for p in IN_ALL],
    ids=str,
)
def test_every_rung_of_a_right_export_that_sees_passes(case: Case, dtype: str, slots, part: str, exported) -> None:
    folder = exported(case, dtype, slots=slots, part=part)
    rungs = climb(folder)
    unable = {BLOCKS, FILE} if dtype == "bfloat16" else set()
    assert {n for n, r in rungs.items() if r.status == "not run"} == unable
    assert {r.status for n, r in rungs.items() if n not in unable} == {"pass"}
    compared = {d["output"] for d in rungs["PyTorch / transformers"].details}
    assert compared >= {"image_features"} | ({"logits"} if part == "all" else set())
    if not unable:
        export = manifest.read(folder)
        steps = {export.place(g.name, s.name) for g in export.graphs for s in g.assembly.steps}
        assert {d["step"] for d in rungs[BLOCKS].details} == steps


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    [found] = [n for n in model.graph.node if n.name == name]
    return found


def swap(name: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        inputs = node(model, name).input
        inputs[0], inputs[1] = inputs[1], inputs[0]

    return change


def attribute(name: str, key: str, value: Any) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        found = node(model, name)
        [old] = [a for a in found.attribute if a.name == key]
        old.CopyFrom(onnx.helper.make_attribute(key, value))

    return change


def one_mask(model: onnx.ModelProto) -> None:
    """All patches are of one segment."""
    equal = node(model, "segment_mask/eq")
    at = list(model.graph.node).index(equal)
    model.graph.node.insert(at, onnx.helper.make_node("Sub", ["segments", "segments"], ["one"], "one"))
    equal.input[1] = "one"
    node(model, "segment_mask/unsqueeze").input[0] = "one"


def one_picture(model: onnx.ModelProto) -> None:
    """No token of text parts two pictures of a row."""
    before = node(model, "splice/cumsum_1")
    at = list(model.graph.node).index(before)
    model.graph.node.insert(at, onnx.helper.make_node("Sub", [before.input[0]] * 2, ["none"], "none"))
    before.input[0] = "none"


def one_position(model: onnx.ModelProto) -> None:
    """All frequencies of mRoPE turn by the first position."""
    name = node(model, "rotary/mul").input[1]
    [axes] = [t for t in model.graph.initializer if t.name == name]
    value = np.zeros_like(onnx.numpy_helper.to_array(axes))
    value[0] = 1
    axes.CopyFrom(onnx.numpy_helper.from_array(value, name))


def no_pictures(graph: str) -> Callable[[onnx.ModelProto], None]:
    """All tokens are words to a mask."""

    def change(model: onnx.ModelProto) -> None:
        [where] = [n for n in model.graph.node if n.name == f"{graph}/where"]
        where.input[1] = where.input[2]

    return change


PLANTED = {
    "row and column of RoPE swapped": (PACKED_ROW, "vision: patch_rotary", swap("patch_rotary/cat")),
    "one mask over all pictures": (PACKED_ROW, "vision: segment_mask", one_mask),
    "tanh for erf": (PACKED_ROW, "vision: patch_merger", attribute("patch_merger/gelu", "approximate", "tanh")),
    "positions of pictures all equal": (PACKED_ROW, "decoder: rotary", one_position),
    "features in each other's places": (PACKED_ROW, "decoder: splice", attribute("splice/cumsum", "reverse", 1)),
    "pictures seen back alone": (MUTUAL, "decoder: mask", no_pictures("mask")),
    "pictures seen back alone, in a window": (MUTUAL, "decoder: mask_window_8", no_pictures("mask_window_8")),
    "all pictures of a row are one": (MUTUAL, "decoder: splice", one_picture),
    "class token first": (TILED, "vision: tile_embedding", swap("tile_embedding/cat")),
    "pixel shuffle by columns": (
        TILED, "vision: pixel_shuffle", attribute("pixel_shuffle/transpose", "perm", [0, 3, 1, 2, 4]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_wrong_with_a_file_is_traced_to_its_block(name: str, exported, tmp_path: Path) -> None:
    case, place, change = PLANTED[name]
    folder = Path(shutil.copytree(exported(case, part="all"), tmp_path / "export"))
    graph = place.partition(":")[0]
    model = onnx.load(folder / f"{graph}.onnx", load_external_data=False)
    change(model)
    (folder / f"{graph}.onnx").write_bytes(model.SerializeToString())
    reseal(folder)
    report = ladder.climb(manifest.read(folder), rungs=("blocks", "onnxruntime"), bisect=True)
    assert {r.status for r in report.rungs} == {"fail"}
    assert report.bisect
    assert report.bisect.block
    assert report.bisect.block["step"] == place


def test_pictures_whose_positions_are_all_equal_are_no_prompt_of_transformers(exported, monkeypatch) -> None:
    def equal(*given: Any) -> np.ndarray:
        return np.broadcast_to(original(*given)[:1], (3, *given[0].shape))

    original = pictures.mrope_positions
    monkeypatch.setattr(pictures, "mrope_positions", equal)
    rungs = climb(exported(PACKED_ROW, part="all"), rungs=("transformers",))
    assert [r.status for r in rungs.values()] == ["fail"]


def shown(folder: Path, change: Callable[[Pictures], Pictures], monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The outputs of the prompt by which our PyTorch is off if it is given other pictures than transformers is."""
    original = stages.Stage.at

    def at(self: stages.Stage, port: Any) -> np.ndarray:
        if self.pictures and port.use in feeds.SEEN:
            return original(dataclasses.replace(self, pictures=change(self.pictures)), port)
        return original(self, port)

    monkeypatch.setattr(stages.Stage, "at", at)
    [rung] = climb(folder, rungs=("transformers",)).values()
    return {d["output"] for d in rung.details if d["step"] == 0 and d["difference"].excess(d["allowed"]) > 1}


@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_colours_that_are_one_per_cent_off_are_found_in_features_and_logits(case: Case, exported, monkeypatch) -> None:
    def louder(given: Pictures) -> Pictures:
        return Pictures(given.pixels * np.float32(1.01), given.grids)

    assert shown(exported(case, part="all"), louder, monkeypatch) == {"image_features", "logits"}


@pytest.mark.parametrize("case", ONE_EACH, ids=str)
@pytest.mark.parametrize("part", ["all", "vision"])
def test_a_pack_holds_the_pictures_and_replays(case: Case, part: str, exported, tmp_path: Path) -> None:
    export, path = manifest.read(exported(case, part=part)), tmp_path / "pack.npz"
    golden.make(export, path, tokens=None, seed=0, force=False)
    with pack.read(path) as opened, _onnx_runtime(export) as run:
        prompt, *others = opened.header.stages
        fed = {port for shot in prompt.shots for port in shot.fed}
        assert "pixel_values" in fed
        # Features are made by the vision graph, and there are none in later steps.
        assert "image_features" not in fed
        for i, stage in enumerate(others, 1) if part == "all" else ():
            [shot] = stage.shots
            assert opened.array(pack.fed_key(i, shot.graph, "image_features")).shape[0] == 0
        assert replay.replay(opened, "x", run).rung.status == "pass"

        def other(graph: str, feed: pack.Arrays) -> pack.Arrays:
            return run(graph, {n: a[::-1] if n == "pixel_values" else a for n, a in feed.items()})

        assert replay.replay(opened, "x", other).rung.status == "fail"


def test_tokens_that_leave_no_room_for_pictures_are_refused(exported) -> None:
    export = manifest.read(exported(PACKED_ROW, part="all"))
    taken = int(np.flatnonzero(np.isin(stages.prompt(export).ids[0], sight(export.blocks).tokens))[-1]) + 1
    said = f"--tokens 9: the pictures of the prompt and the text between them take {taken}: name {taken + 1} or more"
    with pytest.raises(Mismatch, match=said):
        stages.prompt(export, tokens=9)
    assert stages.prompt(export, tokens=taken + 1).ids.shape == (2, taken + 1)


def test_a_static_cache_that_leaves_no_room_for_pictures_is_refused(exported) -> None:
    export = manifest.read(exported(TILED, slots=40, part="all"))
    with pytest.raises(
        Mismatch, match=r"static cache of 40 has room for a prompt of 29 tokens, its pictures and .* take"
    ):
        stages.prompt(export)


def test_an_export_that_reads_no_tokens_takes_no_number_of_them(exported) -> None:
    export = manifest.read(exported(TILED, part="vision"))
    with pytest.raises(Mismatch, match="--tokens 90: this export sees pictures and reads no tokens: leave it out"):
        stages.prompt(export, tokens=90)
