"""The exported folder: whole, portable, light, and refused where it would be wrong."""

from __future__ import annotations

import collections
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from arch_cases import CASES, FIRST, FIRST_EVERY_TIME, OF_ONE_GRAPH, ONCE, PRIMARY, Case, in_each_dtype, others_slow
from first_feed import first_feed
from published_configs import PUBLISHED
from reseal import reseal
from rungs import OF_A_BLOCK

from llmexport.export import archs, graph_file, manifest, onnx_file, random_checkpoint
from llmexport.export.assembly import named_blocks, parts
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.errors import ExportError
from llmexport.export.exported import Export
from llmexport.graphs.bodies import op_of
from llmexport.validate import ladder, stages
from llmexport.validate.compare import compare
from llmexport.validate.tolerance import Tolerance

pytestmark = pytest.mark.model

PLAIN = """
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
given = {"input_ids": [[3, 1, 4]], "position_ids": [[0, 1, 2]], "attention_mask": [[1, 1, 1]]}
types = {"tensor(int64)": "int64", "tensor(float)": "float32"}
sizes = {"batch": 1, "sequence": 3, "total": 3, "past": 0}
feed = {}
for port in session.get_inputs():
    shape = [sizes.get(d, d) for d in port.shape]
    value = numpy.array(given.get(port.name, 0), types[port.type])
    feed[port.name] = numpy.ascontiguousarray(numpy.broadcast_to(value, shape))
logits = session.run(["logits"], feed)[0]
assert list(logits.shape) == [1, 3, int(sys.argv[2])] and numpy.isfinite(logits).all()
assert not [m for m in sys.modules if m.split(".")[0] in ("llmexport", "torch", "onnx")]
"""

# What every case and two published models hold of our ops, and what the passes fused and left.
GOLDEN = json.loads((Path(__file__).parents[1] / "golden_ops.json").read_text())


def summary(export: Export) -> dict[str, Any]:
    """How often each op occurs in an export, and what each pass did, as golden_ops.json has it: by graph, if there are
    several."""
    graphs = json.loads(json.dumps(manifest.as_data(export)["graphs"]))
    found = {name: {"ops": graph["ops"], "fusions": graph["fusions"]} for name, graph in graphs.items()}
    return found.get("model", found)


def request(folder: Path, **changes: object) -> onnx_file.Request:
    checkpoint = open_checkpoint(folder)
    return onnx_file.Request(archs.choose(None, checkpoint.config), checkpoint, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", others_slow(OF_ONE_GRAPH, [c for c in FIRST if c.arch in PRIMARY]), ids=str)
def test_a_process_that_never_heard_of_llmexport_runs_the_model(case: Case, exported) -> None:
    words = archs.load(case.arch).tiny.get("vocab_size", 256)
    subprocess.run([sys.executable, "-c", PLAIN, exported(case) / "model.onnx", str(words)], check=True, cwd="/")


@pytest.mark.parametrize(("case", "dtype"), others_slow(in_each_dtype(FIRST), ONCE), ids=str)
def test_checker_and_strict_shape_inference_accept_copied_weights(case: Case, dtype: str, exported) -> None:
    folder = exported(case, dtype, weights="copy")
    for graph in manifest.read(folder).graphs:
        onnx.checker.check_model(folder / graph.file, full_check=True)
        onnx.shape_inference.infer_shapes(onnx.load(folder / graph.file, load_external_data=False), strict_mode=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_model_has_the_ops_that_its_blocks_make_and_says_which_norms_it_left(case: Case, exported) -> None:
    found = manifest.read(exported(case))
    assert summary(found) == GOLDEN.get(case.name)
    for graph in found.graphs:
        model = onnx.load(exported(case) / graph.file, load_external_data=False)
        nodes = collections.Counter(op_of(n) for n in model.graph.node if n.domain == "llmexport")
        assert graph.ops == nodes


@pytest.mark.parametrize("case", OF_ONE_GRAPH, ids=str)
def test_outputs_agree_before_and_after_fusion_to_fp32_rounding(
    case: Case, tiny_checkpoint, exported, monkeypatch, tmp_path
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(graph_file.pipeline, "PIPELINE", ())
        onnx_file.write(request(tiny_checkpoint(case)), tmp_path / "plain", force=False)
    found = manifest.read(exported(case))
    feed = first_feed(found.graphs[0], stages.prompt(found, tokens=21))
    logits = []
    for folder in (tmp_path / "plain", exported(case)):
        session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        logits.append(session.run(["logits"], feed)[0])
    # A few units in the last place of the largest logit, for every sum over up to 128 terms in another order.
    eps = float(np.finfo(np.float32).eps)
    assert compare(*logits).excess(Tolerance(32 * eps, 32 * eps, scaled=True)) <= 1


def test_linked_weights_add_no_bytes_and_stay_the_checkpoints_own_files(tiny_checkpoint, exported) -> None:
    checkpoint, folder = tiny_checkpoint("gemma"), exported("gemma", weights="link")
    for shard in checkpoint.glob("*.safetensors"):
        assert os.path.samefile(shard, folder / shard.name)
    new = sum(p.stat().st_size for p in folder.iterdir() if p.stat().st_nlink == 1)
    assert new < 100_000


def test_no_weight_is_stored_twice_or_written_anew(tiny_checkpoint, exported) -> None:
    """Every tensor of the checkpoint is one external initialiser, at its own bytes; tied heads share theirs."""
    model = onnx.load(exported("gemma") / "model.onnx", load_external_data=False)
    stored = open_checkpoint(tiny_checkpoint("gemma")).tensors
    external = {t.name: {e.key: e.value for e in t.external_data} for t in model.graph.initializer if t.external_data}
    assert external == {
        n: {"location": t.file, "offset": str(t.offset), "length": str(t.nbytes)} for n, t in stored.items()
    }
    assert sum(t.ByteSize() for t in model.graph.initializer if not t.external_data) < 1000


@pytest.mark.parametrize("arch", ["gemma", pytest.param("rwkv", marks=pytest.mark.slow)])
def test_a_bf16_checkpoint_is_cast_in_the_graph_and_runs(arch, tmp_path) -> None:
    random_checkpoint.write(archs.load(arch), tmp_path / "ck", dtype="bfloat16", shard_bytes=50_000)
    onnx_file.write(request(tmp_path / "ck"), tmp_path / "out", force=False)
    model = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    kinds = {t.data_type for t in model.graph.initializer if t.external_data}
    assert kinds == {onnx.TensorProto.BFLOAT16}
    subprocess.run([sys.executable, "-c", PLAIN, tmp_path / "out" / "model.onnx", "256"], check=True)


@pytest.mark.parametrize("case", others_slow(FIRST, FIRST_EVERY_TIME), ids=str)
def test_every_block_exports_alone_and_equals_its_pytorch(case: Case, tiny_checkpoint, tmp_path) -> None:
    """Those of PRIMARY are also read by TensorRT, a process for each; of the others it reads whole models elsewhere."""
    # Copies, as onnx refuses to load hard links.
    wanted = request(tiny_checkpoint(case), weights="copy")
    records = onnx_file.write_blocks(wanted, tmp_path / "out", force=False)
    steps = onnx_file.read_model(archs.load(case.arch), wanted.checkpoint.config).steps
    inside = {type(part.block).__name__ for step in steps for part in parts(step)}
    assert {type(r.blocks[0]).__name__ for r in records.values()} == inside
    for name in records:
        found = manifest.read(tmp_path / "out" / name)
        onnx.checker.check_model(found.folder / "model.onnx", full_check=True)
        assert ladder.climb(found, rungs=None if case.arch in PRIMARY else OF_A_BLOCK).passed, name


def test_layers_that_differ_in_their_window_alone_are_one_block(exported, tiny_checkpoint) -> None:
    model = onnx_file.read_model(archs.load("qwen2"), open_checkpoint(tiny_checkpoint("qwen2")).config)
    blocks = named_blocks(model)
    assert {"mask", "mask_window_8", "attention", "layer"} <= set(blocks)
    assert len(manifest.read(exported("qwen2")).blocks) == len(
        {"embedding", "rotary", "layer", "head"} | {"mask", "mask 8"}
    )


def test_a_second_export_imports_no_torch(exported, tiny_checkpoint, tmp_path) -> None:
    exported("llama")
    code = (
        "import sys; sys.argv = ['llmexport', 'onnx', '--checkpoint', sys.argv[1], '-o', sys.argv[2], '-q']\n"
        "from llmexport.export.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules and 'onnxscript' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tiny_checkpoint("llama")), str(tmp_path / "out")], check=True)
    assert (tmp_path / "out" / "model.onnx").read_bytes() == (exported("llama") / "model.onnx").read_bytes()


def test_the_graph_does_not_grow_by_more_than_its_layers(tmp_path) -> None:
    """Equal layers are one traced block, whatever their number."""
    arch = archs.load("llama")
    blocks = {}
    for layers in (2, 9):
        random_checkpoint.write(arch, tmp_path / f"{layers}", config={**arch.tiny, "num_hidden_layers": layers})
        record = onnx_file.write(request(tmp_path / f"{layers}"), tmp_path / f"out{layers}", force=False)
        blocks[layers] = (len(record.blocks), len(record.steps))
    assert blocks == {2: (5, 6), 9: (5, 13)}


@pytest.mark.parametrize(("name", "least"), [("gemma-2b", 5e9), ("gpt-oss-20b", 13e9)])
def test_a_published_model_exports_from_headers_alone(name: str, least: float, tmp_path) -> None:
    """Gigabytes of weights that are holes in a file: nothing reads or writes them."""
    config = PUBLISHED[name]
    random_checkpoint.write(archs.choose(None, config), tmp_path / "ck", config=config, hollow=True)
    assert sum(p.stat().st_size for p in (tmp_path / "ck").iterdir()) > least
    record = onnx_file.write(request(tmp_path / "ck"), tmp_path / "out", force=False)
    assert summary(record) == GOLDEN[name]
    new = [p for p in (tmp_path / "out").iterdir() if p.stat().st_nlink == 1]
    assert sum(p.stat().st_size for p in new) < 1_000_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "least"),
    [("bloom", 352e9), ("falcon-40b", 82e9), ("pythia-1b", 2e9), ("phi-2", 5e9), ("stablelm-2-12b", 24e9)],
)
def test_a_published_model_of_alike_layers_is_a_layer_traced_once(name: str, least: float, tmp_path) -> None:
    """And an embedding, a head and what the layers read."""
    config = PUBLISHED[name]
    random_checkpoint.write(archs.choose(None, config), tmp_path / "ck", config=config, dtype="float16", hollow=True)
    assert sum(p.stat().st_size for p in (tmp_path / "ck").iterdir()) > least
    record = onnx_file.write(request(tmp_path / "ck", dtype="float16"), tmp_path / "out", force=False)
    layers = config.get("num_hidden_layers") or config["n_layer"]
    assert (len(record.blocks), len(record.steps)) == (5, layers + 4)
    new = [p for p in (tmp_path / "out").iterdir() if p.stat().st_nlink == 1]
    assert sum(p.stat().st_size for p in new) < 1_500_000


def test_a_tied_head_that_the_checkpoint_also_stores_is_dropped_if_it_is_the_same(tmp_path) -> None:
    folder = with_extra_head(tmp_path, same=True)
    onnx_file.write(request(folder), tmp_path / "out", force=False)


def test_a_tied_head_that_the_checkpoint_stores_otherwise_is_refused(tmp_path) -> None:
    folder = with_extra_head(tmp_path, same=False)
    with pytest.raises(ExportError, match=r"tie_word_embeddings.*lm_head\.weight"):
        onnx_file.write(request(folder), tmp_path / "out", force=False)
    assert not (tmp_path / "out").exists()


def with_extra_head(tmp_path: Path, *, same: bool) -> Path:
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "ck"
    random_checkpoint.write(archs.load("gemma"), folder, dtype="float32")
    [shard] = folder.glob("*.safetensors")
    tensors = load_file(shard)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (0 if same else 1)
    save_file(tensors, shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, shard.name)}))
    return folder


def test_force_does_not_delete_a_checkpoint_inside_the_output(tmp_path) -> None:
    folder = tmp_path / "out" / "checkpoint"
    folder.parent.mkdir()
    (tmp_path / "out" / "manifest.json").write_text("{}")
    random_checkpoint.write(archs.load("gemma"), folder)
    with pytest.raises(ExportError, match="choose another output"):
        onnx_file.write(request(folder), tmp_path / "out", force=True)
    assert (folder / "config.json").exists()


def test_a_shard_that_changed_after_the_export_is_noticed(tmp_path) -> None:
    random_checkpoint.write(archs.load("gemma"), tmp_path / "ck")
    onnx_file.write(request(tmp_path / "ck", weights="copy"), tmp_path / "out", force=False)
    [shard] = (tmp_path / "out").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(ExportError):
        manifest.read(tmp_path / "out")


def test_other_weights_of_the_same_shapes_are_noticed(tmp_path) -> None:
    """A fine-tune copied over a linked checkpoint: size and header stay, the numbers do not."""
    for seed in (0, 7):
        random_checkpoint.write(archs.load("gemma"), tmp_path / f"{seed}", seed=seed)
    onnx_file.write(request(tmp_path / "0", weights="link"), tmp_path / "out", force=False)
    manifest.read(tmp_path / "out")
    [old], [new] = ((tmp_path / s).glob("*.safetensors") for s in ("0", "7"))
    old.write_bytes(new.read_bytes())
    with pytest.raises(ExportError, match="has changed since"):
        manifest.read(tmp_path / "out")


@pytest.mark.parametrize("key", ["weights", "config", "target", "graphs", "dtype"])
def test_a_manifest_without_a_key_is_refused(key: str, exported, tmp_path) -> None:
    folder = Path(shutil.copytree(exported("gemma"), tmp_path / "export"))
    data = json.loads((folder / "manifest.json").read_text())
    del data[key]
    (folder / "manifest.json").write_text(json.dumps(data))
    reseal(folder)
    with pytest.raises(ExportError, match="damaged"):
        manifest.read(folder)
