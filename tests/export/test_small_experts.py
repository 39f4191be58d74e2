"""`--target onnxruntime`: small experts in float32 are MoE's, whose stacks the export writes as that reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from llmexport.export import archs, onnx_file, random_checkpoint
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.exported import Export
from llmexport.export.packed.repack import FILE
from llmexport.export.small_experts import with_small_experts
from llmexport.graphs import lower_small_experts
from llmexport.validate import bound, validate

RUNGS = ("transformers", "blocks", "onnxruntime")


def published(read: Callable[[str], np.ndarray], arch: str, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Of the first layer's last expert, rows of gate and up in turn and of down, as the checkpoint has them in tensors
    of these names, or one by one."""
    if arch == "mixtral":
        gate, up, down = (read(f"model.layers.0.block_sparse_moe.experts.3.{n}.weight") for n in ("w1", "w3", "w2"))
    else:
        both, down = (read(n.removesuffix("/anew"))[-1] for n in names)
        if arch == "gpt_oss":
            return both.T, down.T
        gate, up = np.split(both, 2)
    return np.stack((gate, up), 1).reshape(-1, gate.shape[1]), down


def written(arch: str, checkpoint: Path, to: Path, **kind: str) -> Export:
    request = onnx_file.Request(archs.load(arch), open_checkpoint(checkpoint), target="onnxruntime", **kind)
    return onnx_file.write(request, to)


# Stored as the transpose with rows that alternate, one by one, and in halves.
@pytest.mark.parametrize(
    "arch", ["gpt_oss", *(pytest.param(n, marks=pytest.mark.slow) for n in ("mixtral", "qwen3_5_moe"))]
)
def test_stacks_are_written_in_turn_and_mean_the_same(arch, tmp_path):
    random_checkpoint.write(archs.load(arch), tmp_path / "in", dtype="float32")
    export = written(arch, tmp_path / "in", tmp_path / "out", part="text")
    fused = export.graphs[0].fusions["lower_small_experts"]
    model = onnx.load(export.folder / "model.onnx", load_external_data=False)
    nodes = [n for n in model.graph.node if n.op_type == "MoE"]
    assert (len(nodes), fused.refused) == (fused.count, [])
    assert not [n for n in model.graph.node if n.op_type.startswith("MoeExperts")]
    held = {t.name: t for t in model.graph.initializer}
    checkpoint, before = export.checkpoint(), open_checkpoint(tmp_path / "in").tensors
    names = [nodes[0].input[i] for i in (2, 4)]
    for name, expected in zip(names, published(checkpoint.read, arch, names), strict=True):
        [file] = [e.value for e in held[name].external_data if e.key == "location"]
        assert (file == FILE) is (name not in before)
        assert file != FILE or checkpoint.tensors[name].offset % 64 == 0
        assert np.array_equal(checkpoint.read(name)[-1], expected)
    assert bound.wrong(export, export.graphs[0], model) == {}
    rungs = {r.key: r.status for r in validate(export.folder).rungs}
    assert [rungs[k] for k in RUNGS] == ["pass"] * 3


# Weights of another type than that which computes, and routing weights whose sum is not 1.
@pytest.mark.parametrize(
    ("arch", "stored", "dtype"),
    [("gpt_oss", "bfloat16", "float32"), ("gpt_oss", "float32", "float16"), ("qwen2_moe", "float32", "float32")],
)
def test_others_are_not_rewritten_for_it(arch, stored, dtype, tmp_path):
    random_checkpoint.write(archs.load(arch), tmp_path / "in", dtype=stored)
    export = written(arch, tmp_path / "in", tmp_path / "out", dtype=dtype)
    assert export.graphs[0].fusions["lower_small_experts"].count == 0
    assert "MoE" not in {
        n.op_type for n in onnx.load(export.folder / "model.onnx", load_external_data=False).graph.node
    }
    if arch == "gpt_oss":
        assert FILE not in [w.file for w in export.weights]


def test_a_layer_and_experts_alone_are_right(tmp_path):
    random_checkpoint.write(archs.load("gpt_oss"), tmp_path / "in", dtype="float32")
    for block, count in (("layer", 1), ("experts", 0)):
        export = written("gpt_oss", tmp_path / "in", tmp_path / block, block=block)
        assert export.graphs[0].fusions["lower_small_experts"].count == count
        assert (FILE in [w.file for w in export.weights]) is bool(count)
        rungs = {r.key: r.status for r in validate(export.folder).rungs}
        assert rungs["onnxruntime"] == "pass"


# Of those that lie [outputs, inputs] the bound is half of it.
@pytest.mark.parametrize(("arch", "numbers"), [("gpt_oss", 3 * 64 * 32), ("mixtral", 2 * 3 * 64 * 128)])
def test_larger_ones_are_not_rewritten(arch, numbers, tmp_path, monkeypatch):
    random_checkpoint.write(archs.load(arch), tmp_path / "in", dtype="float32")
    checkpoint = open_checkpoint(tmp_path / "in")
    request = onnx_file.Request(archs.load(arch), checkpoint, target="onnxruntime")
    request, model, _ = onnx_file.open_model(request)
    for bound_at, is_changed in ((numbers, True), (numbers - 1, False)):
        monkeypatch.setattr(lower_small_experts, "SMALL", bound_at)
        changed = with_small_experts(model, request.arch, checkpoint, "onnxruntime", "float32")
        assert (changed != model) is is_changed
