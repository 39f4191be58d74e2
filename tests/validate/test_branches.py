"""Branches of a graph that the prompt of all exports does not take are validated too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from reseal import reseal

from llmexport.export import archs, manifest, onnx_file
from llmexport.export.checkpoint import open_checkpoint
from llmexport.validate import branches, stages, validate
from llmexport.validate.pictures import sight


@pytest.mark.model
@pytest.mark.parametrize("branch", ["then_branch", "else_branch"])
def test_a_fault_where_one_picture_is_seen_and_where_several_are_is_found(
    branch: str, tiny_checkpoint, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint("qwen3_5", "all"))
    request = onnx_file.Request(archs.choose(None, checkpoint.config), checkpoint, target="onnxruntime", part="all")
    folder = onnx_file.write(request, tmp_path / "out").folder
    model = onnx.load(folder / "vision.onnx", load_external_data=False)
    for node in (n for n in model.graph.node if n.name.endswith("attention/segments")):
        [attend] = onnx.helper.get_node_attr_value(node, branch).node
        next(a for a in attend.attribute if a.name == "scale").f *= 1.5
    onnx.save(model, folder / "vision.onnx")
    reseal(folder)
    rungs = {r.key: r for r in validate(folder, rungs=["blocks", "onnxruntime"]).rungs}
    assert [r.status for r in rungs.values()] == ["fail", "fail"]
    wrong = {d["stage"] for d in rungs["onnxruntime"].details if d["difference"].excess(d["allowed"]) > 1}
    assert ("one picture" in wrong, "prompt" in wrong) == (branch == "then_branch", branch == "else_branch")


@pytest.mark.parametrize(("target", "names"), [("portable", []), ("onnxruntime", ["one picture"])])
def test_a_picture_alone_is_that_of_the_prompts_last_row(target: str, names: list[str], exported) -> None:
    export = manifest.read(exported("qwen3_5", part="all", target=target))
    prompt, seen = stages.prompt(export), sight(export.blocks)
    found = list(branches.branching(export, prompt))
    assert [s.name for s in found] == names
    for stage in found:
        assert stage.begins
        assert stage.mask.all()
        assert np.array_equal(stage.ids[0], prompt.ids[1][prompt.mask[1] == 1])
        assert stage.pictures.grids.tolist() == [prompt.pictures.grids[-1].tolist()]
        patches = int(stage.pictures.grids.prod())
        assert np.array_equal(stage.pictures.pixels, prompt.pictures.pixels[-patches:])
        assert np.isin(stage.ids, seen.tokens).sum() == sum(seen.runs(stage.pictures))
