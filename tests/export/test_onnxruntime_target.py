"""`--target onnxruntime`: Attention takes rows and caches as they are, and computes what transformers does."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from decoders import Decoder, prompt, reference, theirs
from packed_exports import exported, logits
from quantised_checkpoints import write

from llmexport.export import archs, engine, onnx_file, random_checkpoint
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.errors import EngineError
from llmexport.export.exported import Export
from llmexport.export.packed.repack import FILE
from llmexport.graphs import lower_small_experts
from llmexport.plugins.spec import op_name
from llmexport.run import triton
from llmexport.validate import bound, validate
from llmexport.validate.compare import compare

# Plain, biases, norms of heads before RoPE, windows, pairs side by side, part of a head, ALiBi, one key for all, linear
# attention between, experts.
LOWERED = {
    "llama": 3,
    "qwen2": 3,
    "qwen3": 3,
    "gemma3_text": 3,
    "cohere": 3,
    "stablelm": 3,
    "bloom": 3,
    "falcon": 3,
    "qwen3_5": 1,
    "mixtral": 3,
    "llama4": 4,
    "hunyuan_v1_dense": 3,
    "ministral3": 3,
}


# How many layers attend over latents: RoPE of pairs side by side and of halves, none.
LATENT = {"deepseek_v2": 3, "deepseek_v3": 3, "glm4_moe_lite": 3, "kimi_linear": 1}


@pytest.fixture
def lowered(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Export]:
    def make(arch: str, **kind: str) -> Export:
        checkpoint = open_checkpoint(tiny_checkpoint(arch))
        request = onnx_file.Request(archs.load(arch), checkpoint, target="onnxruntime", **kind)
        return onnx_file.write(request, tmp_path / "out")

    return make


@pytest.mark.parametrize("arch", LOWERED)
def test_every_attention_is_lowered_and_gives_the_logits_of_transformers(arch, lowered, tiny_checkpoint):
    export = lowered(arch)
    fused = export.graphs[0].fusions["lower_attention"]
    assert (fused.count, fused.refused) == (LOWERED[arch], [])
    graph = onnx.load(export.folder / "model.onnx", load_external_data=False).graph
    assert not [n for n in graph.node if n.op_type == "Concat" and n.input[0].startswith("past")]
    check_logits(export, tiny_checkpoint(arch))


@pytest.mark.parametrize("arch", LATENT)
def test_attention_over_latents_is_lowered_and_gives_the_logits_of_transformers(arch, lowered, tiny_checkpoint):
    export = lowered(arch)
    fused = export.graphs[0].fusions["lower_latent_attention"]
    assert (fused.count, fused.refused) == (LATENT[arch], [])
    check_logits(export, tiny_checkpoint(arch))


def check_logits(export: Export, checkpoint: Path) -> None:
    """A prompt in parts, then token by token, both rows of a batch, one padded on the left."""
    model, cache, found = reference(checkpoint), None, Decoder(export.folder, "onnx")
    ids, mask = prompt()
    positions = np.maximum(mask.cumsum(-1) - 1, 0)
    ends = (0, ids.shape[1] - 6, ids.shape[1] - 2, ids.shape[1] - 1, ids.shape[1])
    for first, last in itertools.pairwise(ends):
        step = slice(first, last)
        given = (ids[:, step], mask[:, :last], positions[:, step])
        expected = theirs(model, *given, cache)
        cache = expected.past_key_values
        made = found.step(given[0], given[2], given[1])
        found.check(expected.logits.numpy(), made, mask[:, step] != 0)


def test_attention_of_another_form_is_left_and_named(lowered):
    export = lowered("bert")
    fused = export.graphs[0].fusions["lower_attention"]
    assert fused.count == 0
    assert all(node.startswith("layers.") for node, _ in fused.refused)
    assert fused.refused


# With experts that are published one by one, and in one tensor.
@pytest.mark.parametrize("arch", ["qwen3", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("float16", marks=pytest.mark.slow)])
def test_it_is_validated_and_tensorrt_is_not_asked(dtype, arch, lowered):
    export = lowered(arch, dtype=dtype)
    rungs = {r.key: r for r in validate(export.folder).rungs}
    assert [rungs[k].status for k in ("transformers", "blocks", "onnxruntime")] == ["pass"] * 3
    says = "exported for ONNX Runtime alone: export it without --target"
    assert (rungs["network"].status, rungs["network"].note) == ("not run", f"it was {says}")
    with pytest.raises(EngineError, match=says):
        engine.build(export.folder)
    assert not (export.folder / "engine.json").exists()
    triton.write(export.folder, export.folder.parent / "repository")


# Clamped SwiGLU and biases, groups of experts and a shared one, weights that scale what goes in, sparse mixer. Small
# ones in float32 are an operator's.
@pytest.mark.parametrize("arch", ["gpt_oss", "deepseek_v3", "llama4", "phimoe", "qwen3_5_moe"])
def test_experts_run_one_by_one_and_give_the_logits_of_transformers(arch, tmp_path):
    random_checkpoint.write(archs.load(arch), tmp_path / "in", dtype="bfloat16")
    checkpoint = open_checkpoint(tmp_path / "in")
    export = onnx_file.write(onnx_file.Request(archs.load(arch), checkpoint, target="onnxruntime"), tmp_path / "out")
    model = onnx.load(export.folder / "model.onnx", load_external_data=False)
    bodies = [f for f in model.functions if op_name(f.name) == "MoeExperts"]
    assert bodies
    assert all("NonZero" in {n.op_type for n in every_node(f)} for f in bodies)
    check_logits(export, tmp_path / "in")


@pytest.mark.parametrize("arch", ["qwen3_5", "qwen3_next", "kimi_linear"])
def test_linear_attention_is_the_runtimes_own_and_gives_the_logits_of_transformers(arch, lowered, tiny_checkpoint):
    export = lowered(arch)
    model = onnx.load(export.folder / "model.onnx", load_external_data=False)
    ran = {op_name(f.name): {n.op_type for n in f.node if n.domain == "com.microsoft"} for f in model.functions}
    rules = {op: own for op, own in ran.items() if op.endswith("DeltaRule")}
    assert set.union(*rules.values()) == {"LinearAttention"}
    assert ran["CausalConv1d"] == {"CausalConvWithState"}
    check_logits(export, tiny_checkpoint(arch))


def every_node(within: onnx.FunctionProto | onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in within.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from every_node(attribute.g)


def test_experts_published_one_by_one_are_stacked_in_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(lower_small_experts, "SMALL", 3 * 64 * 128 - 1)
    arch = archs.load("mixtral")
    random_checkpoint.write(arch, tmp_path / "in", dtype="float32")
    request = onnx_file.Request(arch, open_checkpoint(tmp_path / "in"), target="onnxruntime")
    export = onnx_file.write(request, tmp_path / "out")
    model = onnx.load(export.folder / "model.onnx", load_external_data=False)
    stacks = [t for t in model.graph.initializer if ".experts." in t.name]
    assert {tuple(t.dims) for t in stacks} == {(4, 256, 64), (4, 64, 128)}
    assert {e.value for t in stacks for e in t.external_data if e.key == "location"} == {FILE}
    [written] = [w for w in export.weights if w.file == FILE]
    assert written.placed == "repacked"
    assert bound.wrong(export, export.graphs[0], model) == {}
    checkpoint = export.checkpoint()
    first = "model.layers.0.block_sparse_moe.experts."
    gate, up = (checkpoint.read(f"{first}2.{n}.weight").view(np.int16) for n in ("w1", "w3"))
    assert np.array_equal(checkpoint.read(f"{first}gate_up_proj")[2].view(np.int16), np.concatenate((gate, up)))


def test_experts_in_bfloat16_are_stacked_as_they_are(tmp_path):
    arch = archs.load("mixtral")
    random_checkpoint.write(arch, tmp_path / "in", dtype="bfloat16")
    export, portable = (
        onnx_file.write(onnx_file.Request(arch, open_checkpoint(tmp_path / "in"), target=target), tmp_path / target)
        for target in ("onnxruntime", "portable")
    )
    checkpoint = export.checkpoint()
    first = "model.layers.0.block_sparse_moe.experts."
    assert checkpoint.tensors[f"{first}down_proj"].dtype == "BF16"
    down, whole = checkpoint.read(f"{first}3.w2.weight"), checkpoint.read(f"{first}down_proj")
    assert np.array_equal(whole[3].view(np.int16), down.view(np.int16))
    assert compare(logits(portable), logits(export)).max_abs <= 1e-5


def test_experts_in_8_bits_stay_as_they_are_published(tmp_path):
    write(tmp_path, "w8a16", "mixtral")
    export, portable = exported(tmp_path, "ck", target="onnxruntime"), exported(tmp_path, "meant")
    assert FILE not in [w.file for w in export.weights]
    assert compare(logits(portable), logits(export)).max_abs <= 1e-5
