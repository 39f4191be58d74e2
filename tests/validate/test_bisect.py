"""What is wrong in an export is traced to its block and its node, and a right one has neither."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from arch_cases import PRIMARY, others_slow
from reseal import reseal
from two_graphs import in_two, rebuilt

from llmexport.export import archs, graph_file, manifest, onnx_file, random_checkpoint
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.cli.main import main
from llmexport.export.errors import ExportError
from llmexport.export.exported import Export
from llmexport.export.spec import Layer, Step
from llmexport.graphs.bodies import op_of
from llmexport.graphs.fuse_add_rms_norm import fuse_add_rms_norm
from llmexport.validate import bound, facts, ladder, nodes, page
from llmexport.validate.judge import feeds_alone
from llmexport.validate.report import Bisection, Report

pytestmark = pytest.mark.model
# Given a file, its export and a step to damage: the node that is wrong then.
Fault = Callable[[onnx.ModelProto, Export, Step], onnx.NodeProto]


def of_step(model: onnx.ModelProto, step: Step, *ops: str) -> list[onnx.NodeProto]:
    return [n for n in model.graph.node if n.name.startswith(f"{step.name}/") and (not ops or op_of(n) in ops)]


def swap_inputs(model: onnx.ModelProto, export: Export, step: Step) -> onnx.NodeProto:
    """Keys for values."""
    [node] = of_step(model, step, "Attention", "SinkAttention")
    node.input[1], node.input[2] = node.input[2], node.input[1]
    return node


def matrix(export: Export, step: Step) -> str:
    """The name of a matrix of the step."""
    checkpoint, weights = export.checkpoint(), export.graphs[-1].step_weights[step.name]
    return next(n for n in weights.values() if isinstance(n, str) and len(checkpoint.tensors[n].shape) == 2)


def perturb_weight(model: onnx.ModelProto, export: Export, step: Step) -> onnx.NodeProto:
    name = matrix(export, step)
    wrong = export.checkpoint().read(name).copy()
    wrong[0] += 1
    [held] = [t for t in model.graph.initializer if t.name == name]
    held.CopyFrom(onnx.numpy_helper.from_array(wrong, name))
    return next(n for n in model.graph.node if name in n.input)


def move_weight(model: onnx.ModelProto, export: Export, step: Step) -> onnx.NodeProto:
    """The numbers that lie one number further on, or before."""
    name = matrix(export, step)
    [held] = [t for t in model.graph.initializer if t.name == name]
    said = {e.key: e for e in held.external_data}
    end = int(said["offset"].value) + int(said["length"].value)
    room = (export.folder / said["location"].value).stat().st_size - end
    said["offset"].value = str(int(said["offset"].value) + (4 if room else -4))
    return next(n for n in model.graph.node if name in n.input)


def change_epsilon(model: onnx.ModelProto, export: Export, step: Step) -> onnx.NodeProto:
    """Of the body of one fused node."""
    node = of_step(model, step, "AddRmsNorm")[0]
    body = model.functions.add()
    body.CopyFrom(next(f for f in model.functions if f.name == node.op_type))
    # That of the sum, behind a norm of what is added if there is one.
    epsilon = [a for n in body.node for a in n.attribute if a.name == "epsilon"][-1]
    epsilon.f = 0.1
    body.name = node.op_type = f"{node.op_type}__wrong"
    return node


def flip_attribute(model: onnx.ModelProto, export: Export, step: Step) -> onnx.NodeProto:
    """The scale of an attention; where it is in a body, the permutation of a square matrix."""
    for node in of_step(model, step, "Attention"):
        [scale] = [a for a in node.attribute if a.name == "scale"]
        scale.f *= 2
        return node
    tensors = export.checkpoint().tensors
    square = [n for n, t in tensors.items() if len(set(t.shape)) == 1 < len(t.shape)]
    node = next(n for n in of_step(model, step, "Transpose") if n.input[0].removesuffix("/cast") in square)
    node.attribute[0].CopyFrom(onnx.helper.make_attribute("perm", [0, 1]))
    return node


FAULTS = (swap_inputs, perturb_weight, move_weight, change_epsilon, flip_attribute)


def damaged(source: Path, folder: Path, fault: Fault, step: str = "") -> tuple[Path, Step, str]:
    """A copy of an export with a fault in a step of its last graph, the last layer if none is named; step and node."""
    folder = Path(shutil.copytree(source, folder / "export"))
    export = manifest.read(folder)
    steps = {s.name: s for s in export.steps}
    chosen = steps[step] if step else [s for s in export.steps if isinstance(s.block, Layer)][-1]
    file = folder / export.graphs[-1].file
    model = onnx.load(file, load_external_data=False)
    node = fault(model, export, chosen).name
    file.write_bytes(model.SerializeToString())
    reseal(folder)
    return folder, chosen, node


def bisected(folder: Path, **options: int) -> tuple[Report, Bisection]:
    report = ladder.climb(manifest.read(folder), rungs=["blocks"], bisect=True, **options)
    assert report.bisect
    return report, report.bisect


EVERY = [(arch, fault, "float32") for arch in PRIMARY for fault in FAULTS]
EVERY += [(("qwen3_5_moe", "gemma")[i % 2], fault, "float16") for i, fault in enumerate(FAULTS)]
# Each architecture, each fault and both types.
QUICK = [(arch, FAULTS[i], "float32") for i, arch in enumerate(PRIMARY)] + [("gemma", change_epsilon, "float16")]


@pytest.mark.parametrize(
    ("arch", "fault", "dtype"), others_slow(EVERY, QUICK), ids=lambda v: v if isinstance(v, str) else v.__name__
)
def test_a_fault_is_traced_to_its_block_and_its_node(
    arch: str, fault: Fault, dtype: str, exported, tmp_path: Path
) -> None:
    folder, step, node = damaged(exported(arch, dtype), tmp_path, fault)
    report, found = bisected(folder)
    assert found.block
    assert found.node
    assert (found.block["step"], found.node.name, found.node.over) == (step.name, node, True)
    named = matrix(manifest.read(folder), step) if fault in (perturb_weight, move_weight) else ""
    assert [named in w for w in found.weights] == ([True] if named else [])
    assert not report.passed


def test_what_is_said_of_a_node_is_how_it_differs(exported, tmp_path: Path) -> None:
    said = {}
    for fault in FAULTS:
        folder, _, _ = damaged(exported("gemma"), tmp_path / fault.__name__, fault)
        _, found = bisected(folder)
        said[fault.__name__] = found.node.said if found.node else ""
    assert "input 1 is present.2.value, an export makes it present.2.key" in said["swap_inputs"]
    assert said["change_epsilon"] == "its function body is not the one that an export writes"
    assert said["flip_attribute"] == "scale is 0.353553, an export makes it 0.176777"


@pytest.mark.slow
def test_an_op_that_writes_a_cache_is_told_from_what_an_export_writes(exported, tmp_path: Path) -> None:
    def swap_pasts(model: onnx.ModelProto, export: Export, step: Step) -> onnx.NodeProto:
        [node] = of_step(model, step, "QkNormRopeWrite")
        node.input[5], node.input[6] = node.input[6], node.input[5]
        return node

    folder, _, node = damaged(exported("gemma", slots=64, cache="static-fused"), tmp_path, swap_pasts)
    _, found = bisected(folder)
    assert found.node
    assert found.node.name == node
    past = "past_key_values.2"
    assert f"input 5 is {past}.value, an export makes it {past}.key" in found.node.said


@pytest.mark.parametrize(("arch", "dtype"), [("qwen3_5_moe", "float32"), ("gemma", "float16")])
def test_of_a_right_export_nothing_leaves_tolerance(arch: str, dtype: str, exported) -> None:
    report, found = bisected(exported(arch, dtype))
    assert (found.found, found.lines, report.passed) == (False, [("bisect", "nothing leaves tolerance")], True)


def run_alone(export: Export, step: Step, damage: Callable[[onnx.ModelProto], None] = id) -> list[nodes.Output]:
    """Every node of a step of the first graph alone, on what the trace computes."""
    graph, dtype = export.graphs[0], export.dtype
    model = graph_file.load(export, graph)
    _, feed = next(feeds_alone(step, dtype, 0))
    own, opset = bound.parameters(graph, model, export.checkpoint())[step.name], graph.assembly.opset
    traced = graph_file.as_traced(step, own, export.checkpoint(), dtype, opset)
    part = graph_file.cut_step(model, step, dtype)
    damage(part)
    return list(nodes.run_alone(part, traced, feed, export.folder))


RIGHT = [(arch, dtype) for arch in PRIMARY for dtype in ("float32", "float16")]


@pytest.mark.parametrize(("arch", "dtype"), others_slow(RIGHT, [("gpt_oss", "float32"), ("llama4", "float16")]))
def test_no_node_of_a_right_export_is_off(arch: str, dtype: str, exported) -> None:
    export = manifest.read(exported(arch, dtype))
    for step in export.steps:
        outputs = run_alone(export, step)
        assert {o.name for o in outputs} >= set(step.outputs)
        assert [(o.name, o.excess) for o in outputs if o.excess > 1] == []
    assert bound.wrong(export, export.graphs[0], graph_file.load(export, export.graphs[0])) == {}


def test_a_node_that_two_blocks_share_is_named_in_the_block_that_reads_it(exported, tmp_path: Path) -> None:
    """The last sum of a layer is fused with the norm of the head."""

    def last_epsilon(model: onnx.ModelProto, export: Export, step: Step) -> onnx.NodeProto:
        first, last = of_step(model, step, "AddRmsNorm")
        kept = first.op_type
        wrong = change_epsilon(model, export, step)
        first.op_type, last.op_type = kept, wrong.op_type
        return last

    folder, step, node = damaged(exported("gemma"), tmp_path, last_epsilon)
    _, found = bisected(folder)
    assert (found.block["step"], found.node.name) == ("head", node)
    assert node.startswith(step.name)


def test_experts_put_together_in_a_wrong_order_are_found_where_they_are(exported, tmp_path: Path) -> None:
    def swap_experts(model: onnx.ModelProto, export: Export, step: Step) -> onnx.NodeProto:
        stack = next(n for n in model.graph.node if n.op_type == "Concat" and f".{step.path}" in n.name)
        stack.input[0], stack.input[2] = stack.input[2], stack.input[0]
        return stack

    folder, step, node = damaged(exported("mixtral"), tmp_path, swap_experts)
    _, found = bisected(folder)
    assert (found.block["step"], found.node.name, found.weights) == (step.name, node, ())


def test_a_pass_that_changes_numbers_is_found_in_the_node_that_it_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong_pass(graph: gs.Graph):
        fused = fuse_add_rms_norm(graph)
        for node in graph.nodes:
            if node.op == "AddRmsNorm" and node.name.startswith("layers.1/"):
                node.attrs["epsilon"] = 0.1
        return fused

    monkeypatch.setattr(graph_file.pipeline, "PIPELINE", (wrong_pass,))
    random_checkpoint.write(archs.load("gemma"), tmp_path / "ck")
    request = onnx_file.Request(archs.load("gemma"), open_checkpoint(tmp_path / "ck"))
    onnx_file.write(request, tmp_path / "out", force=False)
    _, found = bisected(tmp_path / "out")
    assert (found.block["step"], found.node.op) == ("layers.1", "AddRmsNorm")
    assert found.node.said.startswith("an export makes the same node: a pass")


def test_of_several_graphs_the_block_is_said_with_its_own(tmp_path: Path) -> None:
    random_checkpoint.write(archs.load("gemma"), tmp_path / "ck")
    onnx_file.write(rebuilt("gemma", tmp_path / "ck", in_two), tmp_path / "out", force=False)
    folder, step, node = damaged(tmp_path / "out", tmp_path, perturb_weight)
    _, found = bisected(folder)
    assert (found.block["step"], found.node.name) == (f"decoder: {step.name}", node)
    assert [w.partition(": model.")[0] for w in found.weights] == [f"decoder: {step.name}"]


def test_a_node_that_does_not_run_is_named(exported) -> None:
    """Nodes before it are held to what they should give all the same."""

    def swap(part: onnx.ModelProto) -> None:
        node = next(n for n in part.graph.node if n.name == "layers.1/linear_5")
        node.input[0], node.input[1] = node.input[1], node.input[0]

    export = manifest.read(exported("gemma"))
    *before, stopped = run_alone(export, next(s for s in export.steps if s.name == "layers.1"), swap)
    assert (stopped.node.name, stopped.excess) == ("layers.1/linear_5", np.inf)
    assert stopped.said
    assert "layers.1/linear_4" in {o.node.name for o in before}
    assert max(o.excess for o in before) <= 1


def negate_scale(model: onnx.ModelProto, export: Export, step: Step) -> onnx.NodeProto:
    """Which ONNX Runtime does not take."""
    [node] = of_step(model, step, "Attention")
    [scale] = [a for a in node.attribute if a.name == "scale"]
    scale.f = -scale.f
    return node


def reshape_wrongly(model: onnx.ModelProto, export: Export, step: Step) -> onnx.NodeProto:
    """In which ONNX Runtime stops."""
    node = of_step(model, step, "Reshape")[0]
    [shape] = [t for t in model.graph.initializer if t.name == node.input[1]]
    sizes = onnx.numpy_helper.to_array(shape).copy()
    sizes[-1] += 1
    shape.CopyFrom(onnx.numpy_helper.from_array(sizes, shape.name))
    return node


@pytest.mark.parametrize("fault", [negate_scale, reshape_wrongly])
def test_a_fault_that_stops_onnx_runtime_is_traced_as_well(fault: Fault, exported, tmp_path: Path) -> None:
    folder, step, node = damaged(exported("gemma"), tmp_path, fault)
    report, found = bisected(folder)
    assert (found.block["step"], found.node.name, report.passed) == (step.name, node, False)
    assert ("first block", f"{step.name} (layer), hidden.3 in prompt: ONNX Runtime stops in it") in found.lines
    assert node in page.page(facts.facts(manifest.read(folder)), report)


@pytest.mark.parametrize("fault", [change_epsilon, negate_scale, reshape_wrongly])
def test_a_block_alone_is_bisected_as_well(fault: Fault, tmp_path: Path) -> None:
    random_checkpoint.write(archs.load("gemma"), tmp_path / "ck")
    request = onnx_file.Request(archs.load("gemma"), open_checkpoint(tmp_path / "ck"), block="layer")
    onnx_file.write(request, tmp_path / "out", force=False)
    [step] = manifest.read(tmp_path / "out").steps
    folder, _, node = damaged(tmp_path / "out", tmp_path, fault, step.name)
    report = ladder.climb(manifest.read(folder), bisect=True)
    assert (report.bisect.block["step"], report.bisect.node.name) == (step.name, node)


def test_bfloat16_is_refused_in_one_line(exported) -> None:
    with pytest.raises(ExportError, match="no bfloat16 MatMul on a CPU: bisect a float32 or float16 export"):
        ladder.climb(dataclasses.replace(manifest.read(exported("gemma")), dtype="bfloat16"), bisect=True)


def test_the_command_line_and_both_files_name_what_was_found(
    exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, step, node = damaged(exported("gemma"), tmp_path, flip_attribute)
    monkeypatch.setattr(sys, "argv", ["llmexport", "validate", str(folder), "--rungs", "onnxruntime", "--bisect"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    said = json.loads((folder / "report.json").read_text())["bisect"]
    assert (said["block"]["step"], said["node"]["name"]) == (step.name, node)
    for text in (capsys.readouterr().out, (folder / "report.html").read_text()):
        assert node in text
        assert "first block" in text
        assert "scale is 0.353553" in text
