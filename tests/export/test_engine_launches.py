"""What a decode layer launches in an engine that TensorRT-RTX has built, all ops of ours plugin layers; no GPU.

golden_kernels.json holds it, counted from what the builder lists, where golden_launches.json is a count of the graph by
rule: a launch that comes back is seen here even if it is the builder that puts it between.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
from collections.abc import Container, Sequence
from pathlib import Path

import pytest
from arch_cases import others_slow
from native import emulated_library

from llmexport.export import builder, engine, manifest
from llmexport.export.engine_kernels import Kernel, by_kind
from llmexport.export.profile import parse_profile

pytestmark = pytest.mark.engine

FILE = "tests/golden_kernels.json"
GOLDEN = json.loads((Path(__file__).parents[2] / FILE).read_text())
DECODE = "batch=1:4:8,sequence=1:1:1"
Layers = dict[str, list[Kernel]]


def built(exported_as_stored, row: str, tmp_path: Path) -> Layers:
    """The kernels of the layers of a row, which names an architecture, a cache if it is not `static`, and `all` where
    windows keep all slots."""
    arch, cache, windows = [*row.split(), *("static", "last")[len(row.split()) - 1 :]]
    grows = cache == "dynamic"
    export = exported_as_stored(arch, slots=None if grows else 64, cache=cache, window_slots=windows)
    folder = Path(shutil.copytree(export, tmp_path / "export"))
    profile = parse_profile(DECODE + (",past=1:128:256" if grows else ""))
    kernels = engine.build(folder, profile=profile, plugins=emulated_library()).graphs["model"].kernels
    assert kernels, "TensorRT listed no kernels, or they could not be read: see engine_kernels.py"
    [graph] = manifest.read(folder).graphs
    return by_layer(kernels, {s.name for s in graph.assembly.steps})


def by_layer(kernels: Sequence[Kernel], steps: Container[str]) -> Layers:
    """The kernels of each layer: one that computes two is the first's, and one of no step that is known, as where
    TensorRT put it between, that of the kernel before it; masks, positions, embedding and head are of none."""
    layers: Layers = {}
    last = ""
    for kernel in kernels:
        # So the nodes of a body that was inlined are called.
        of = {n.removeprefix("node_of_").split("/")[0] for n in kernel.nodes}
        found = sorted((s for s in of if s.startswith("layers.")), key=lambda s: int(s.removeprefix("layers.")))
        last = found[0] if found else last
        if last and (found or not any(s in steps for s in of)):
            layers.setdefault(last, []).append(kernel)
    return layers


def counted(layers: Layers, steps: Sequence[str]) -> dict[str, dict[str, int]]:
    """What golden_kernels.json says of layers."""
    found = {step: by_kind(layers.get(step, [])) for step in steps}
    return {step: {**dict(sorted(counts.items())), "all": counts.total()} for step, counts in found.items()}


def changed(row: str, layers: Layers, found: dict[str, dict[str, int]]) -> str:
    """What is to be known of a row that is not golden any more."""
    said = [f"{row} with TensorRT-RTX {importlib.metadata.version('tensorrt_rtx')}, golden {GOLDEN['tensorrt_rtx']}:"]
    for step, counts in found.items():
        golden = GOLDEN["rows"][row][step]
        if counts != golden:
            kinds = sorted(k for k in golden.keys() | counts if golden.get(k) != counts.get(k))
            said += [f"{step}: " + ", ".join(f"{k} {golden.get(k, 0)} -> {counts.get(k, 0)}" for k in kinds)]
            said += [f"  {k.launches} {k.kind} {k.name}" for k in layers.get(step, [])]
    return "\n".join([*said, f"if that is meant, {FILE} takes:", f"{json.dumps(row)}: {json.dumps(found)}"])


@pytest.mark.parametrize("row", others_slow(list(GOLDEN["rows"]), ["gemma static-fused", "qwen3_5_moe"]))
def test_a_decode_layer_of_an_engine_takes_no_launch_more(row: str, exported_as_stored, tmp_path: Path) -> None:
    layers = built(exported_as_stored, row, tmp_path)
    found = counted(layers, list(GOLDEN["rows"][row]))
    assert found == GOLDEN["rows"][row], changed(row, layers, found)


def test_launches_that_come_back_are_seen_and_named(exported_as_stored, tmp_path: Path, monkeypatch) -> None:
    """Those of experts that are built from their body; the norm of their sum is then a plugin of its own, and so is the
    activation of the shared one."""
    served = engine.library.served(emulated_library()) - {"MoeExperts"}
    monkeypatch.setattr(engine.library, "served", lambda path: served)
    layers = built(exported_as_stored, "qwen3_5_moe", tmp_path)
    found, golden = counted(layers, ["layers.1"]), GOLDEN["rows"]["qwen3_5_moe"]["layers.1"]
    assert found["layers.1"]["plugin"] == golden["plugin"] - 3 + 2
    assert found["layers.1"]["all"] > golden["all"]
    said = changed("qwen3_5_moe", layers, found).splitlines()
    assert said[1].startswith(f"layers.1: all {golden['all']} -> {found['layers.1']['all']}, ")
    assert len(said) == 2 + len(layers["layers.1"]) + 2
    assert said[-1] == f'"qwen3_5_moe": {json.dumps(found)}'


@pytest.mark.parametrize("line", ["None of them", "Layers:"])
def test_an_engine_whose_list_cannot_be_read_is_built_without(
    line: str, exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where TensorRT lists nothing, or in another form, here with nothing before a name."""
    code = "import re, sys; from pathlib import Path; from llmexport.export import engine_build, engine_kernels; "
    code += f"engine_kernels.HEADING = {line + chr(10)!r}; engine_kernels.LINE = re.compile('N: '); "
    code += "engine_build.main(Path(sys.argv[1]))"
    monkeypatch.setattr(builder, "COMMAND", (sys.executable, "-c", code))
    folder = Path(shutil.copytree(exported("llama", block="attention"), tmp_path / "export"))
    assert engine.build(folder).graphs["model"].kernels is None
    assert json.loads((folder / "engine.json").read_text())["graphs"]["model"]["kernels"] is None


def kernel(name: str, *nodes: str) -> Kernel:
    return Kernel(name, "generated", nodes)


def test_a_kernel_is_of_one_layer_or_of_none() -> None:
    kernels = [
        kernel("before"),
        kernel("norm", "embedding/embedding", "layers.0/rms_norm"),
        kernel("two", "layers.10/mul", "layers.9/add"),
        kernel("mask", "mask/ge"),
        kernel("copy"),
        kernel("body", "node_y__2"),
        kernel("inlined", "node_y__4", "node_of_layers.10/to"),
        kernel("head", "head/linear"),
    ]
    layers = by_layer(kernels, {"embedding", "mask", "layers.0", "layers.9", "layers.10", "head"})
    found = {step: [k.name for k in layer] for step, layer in layers.items()}
    assert found == {"layers.0": ["norm"], "layers.9": ["two", "copy", "body"], "layers.10": ["inlined"]}
