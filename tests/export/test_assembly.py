"""Blocks as values, the model as steps, and what the checkpoint calls each weight."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from arch_cases import CASES, FIRST, Case

from llmexport.export import archs, manifest
from llmexport.export.assembly import Assembly, alone, assemble, checkpoint_name, find_block, named_blocks
from llmexport.export.errors import ExportError
from llmexport.export.onnx_file import read_model
from llmexport.export.spec import (
    Attention,
    Block,
    DecoderLayer,
    Embedding,
    Head,
    LinearScaling,
    Llama3Scaling,
    Mask,
    Mlp,
    Model,
    Norm,
    Port,
    Rotary,
    from_data,
    to_data,
)
from llmexport.export.trace import module_shapes

NORM = Norm(64, 1e-6)
# One of each kind, and of each variant that a field makes.
BLOCKS = [
    Embedding(256, 64),
    Embedding(256, 64, 8.0),
    Rotary(16, 10000.0),
    Rotary(16, 10000.0, LinearScaling(4.0)),
    Rotary(16, 10000.0, Llama3Scaling(8.0, 1.0, 4.0, 64)),
    Mask(),
    Mask(8),
    NORM,
    Norm(64, 1e-5),
    Norm(64, 1e-6, 1.0),
    Norm(64, 1e-6, 0.0, "after_weight"),
    Attention(64, 4, 2, 16),
    Attention(64, 4, 2, 16, qkv_bias=True),
    Attention(64, 4, 2, 16, out_bias=True),
    Mlp(64, 128, "silu"),
    Mlp(64, 128, "gelu_tanh"),
    Mlp(64, 128, "silu", bias=True),
    DecoderLayer(NORM, Attention(64, 4, 2, 16), NORM, Mlp(64, 128, "silu")),
    Head(NORM, 256),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


def model_of(case: Case | str) -> Model:
    if isinstance(case, str):
        case = Case(case, case)
    return read_model(archs.load(case.arch), {**archs.load(case.arch).arch.tiny, **case.changes})


def published_shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """The tensors that transformers would save, by name; a tied head is saved once."""
    arch = archs.load(case.arch).arch
    model_class = getattr(transformers, arch.causal_lm)
    with torch.device("meta"):
        model = model_class(model_class.config_class(**{**arch.tiny, **case.changes}))
    return {n: tuple(p.shape) for n, p in model.named_parameters()}


def same(block: Block) -> Block:
    """An equal block that is another object, down to its parts."""
    return from_data(json.loads(json.dumps(to_data(block))))


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_comes_back_from_json(block):
    assert same(block) == block


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_equal_blocks_are_one_key(block):
    assert {block: 1}[same(block)] == 1


def test_blocks_that_differ_in_one_field_differ():
    assert len(set(BLOCKS)) == len(BLOCKS)


def test_blocks_that_differ_have_different_data():
    assert len({json.dumps(to_data(b)) for b in BLOCKS}) == len(BLOCKS)


def test_a_port_comes_back_from_json():
    port = Port("hidden", ("batch", "sequence", 64))
    assert from_data(json.loads(json.dumps(to_data(port)))) == port


def test_data_of_an_unknown_class_is_refused():
    with pytest.raises(KeyError, match="Unheard"):
        from_data({"is": "Unheard", "size": 3})


def test_a_block_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        NORM.size = 3


def test_every_kind_of_block_is_tested_here():
    assert {b.kind for b in BLOCKS} == Block.kinds.keys()


@cases
def test_every_step_reads_what_is_there_already(case):
    assembly = assemble(model_of(case))
    there = {p.name for p in assembly.inputs}
    for step in assembly.steps:
        assert set(step.inputs) <= there
        there |= set(step.outputs)
    assert {p.name for p in assembly.outputs} <= there


@cases
def test_every_value_is_made_once(case):
    assembly = assemble(model_of(case))
    made = [p.name for p in assembly.inputs] + [n for s in assembly.steps for n in s.outputs]
    assert len(made) == len(set(made))


@cases
def test_maker_and_readers_agree_on_the_shape_of_a_value(case):
    assembly = assemble(model_of(case))
    shapes: dict[str, set[Any]] = {p.name: {(p.shape, p.dtype)} for p in (*assembly.inputs, *assembly.outputs)}
    for step in assembly.steps:
        for names, ports in ((step.inputs, step.block.inputs), (step.outputs, step.block.outputs)):
            for name, port in zip(names, ports, strict=True):
                shapes.setdefault(name, set()).add((port.shape, port.dtype))
    assert {n: s for n, s in shapes.items() if len(s) > 1} == {}


def test_the_model_has_the_names_that_people_know():
    assembly = assemble(model_of("llama"))
    pairs = [(i, part) for i in range(3) for part in ("key", "value")]
    inputs = ["input_ids", "position_ids", "attention_mask", *(f"past_key_values.{i}.{p}" for i, p in pairs)]
    assert [p.name for p in assembly.inputs] == inputs
    assert [p.name for p in assembly.outputs] == ["logits", *(f"present.{i}.{p}" for i, p in pairs)]


def kinds(assembly: Assembly) -> list[str]:
    return [b.kind for b in assembly.blocks]


@pytest.mark.parametrize("arch", ["gemma", "llama", "mistral"])
def test_equal_layers_are_one_block(arch):
    assembly = assemble(model_of(arch))
    assert len([s for s in assembly.steps if s.block.kind == "decoder_layer"]) == 3
    assert kinds(assembly) == ["embedding", "rotary", "mask", "decoder_layer", "head"]


def test_layers_of_two_windows_are_one_block_and_two_masks():
    assembly = assemble(model_of("qwen2"))
    assert kinds(assembly) == ["embedding", "rotary", "mask", "mask", "decoder_layer", "head"]


def test_a_layer_reads_the_mask_of_its_window():
    steps = {s.name: s for s in assemble(model_of("qwen2")).steps}
    assert [steps[f"layers.{i}"].inputs[3] for i in range(3)] == ["mask", "mask_window_8", "mask_window_8"]


def test_a_block_alone_has_its_ports_for_values():
    assembly = alone(find_block(model_of("llama"), "mlp"))
    assert ([p.name for p in assembly.inputs], [p.name for p in assembly.outputs]) == (["normed"], ["mixed"])
    assert assembly.steps[0].path == "layers.0.mlp."


def test_every_kind_of_block_has_a_name():
    names = ["embedding", "rotary", "mask", "decoder_layer", "norm", "attention", "mlp", "head"]
    assert list(named_blocks(model_of("gemma"))) == names


def test_the_second_of_a_kind_is_named_by_its_place():
    assert list(named_blocks(model_of("qwen2")))[2:5] == ["mask", "mask_window_8", "decoder_layer"]


@cases
def test_named_blocks_differ(case):
    blocks = [s.block for s in named_blocks(model_of(case)).values()]
    assert len(blocks) == len(set(blocks))


def test_an_unknown_block_is_refused_with_the_names_there_are():
    with pytest.raises(ExportError, match=r"no block 'moe' in this model, its blocks are: embedding, .*mlp"):
        find_block(model_of("llama"), "moe")


@cases
def test_weights_are_those_that_transformers_saves(case):
    arch, model = archs.load(case.arch).arch, model_of(case)
    found = {
        checkpoint_name(arch, model, step.path + path): shape
        for step in assemble(model).steps
        for path, shape in module_shapes(step.block).items()
    }
    assert found == published_shapes(case)


@cases
def test_weights_of_a_block_alone_are_those_that_transformers_saves(case):
    arch, model = archs.load(case.arch).arch, model_of(case)
    published = published_shapes(case)
    for step in named_blocks(model).values():
        for path, shape in module_shapes(step.block).items():
            assert published[checkpoint_name(arch, model, step.path + path)] == shape


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("embedding.weight", "model.embed_tokens.weight"),
        ("layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("layers.17.self_attn.q_proj.bias", "model.layers.17.self_attn.q_proj.bias"),
        ("head.norm.weight", "model.norm.weight"),
        ("head.projection.weight", "lm_head.weight"),
    ],
)
def test_a_path_has_its_published_name(path, name):
    assert checkpoint_name(archs.load("llama").arch, model_of("llama"), path) == name


def test_a_tied_head_is_the_embedding():
    name = checkpoint_name(archs.load("gemma").arch, model_of("gemma"), "head.projection.weight")
    assert name == "model.embed_tokens.weight"


def test_a_path_that_the_architecture_does_not_name_is_refused():
    with pytest.raises(KeyError, match="vision"):
        checkpoint_name(archs.load("llama").arch, model_of("llama"), "vision.patch.weight")


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_an_export_has_two_fused_norms_and_one_fused_activation_a_layer(case: Case, exported: Callable[..., Path]):
    layers = len(model_of(case).layers)
    record = manifest.read(exported(case)).data
    assert record["ops"] == {"AddRmsNorm": 2 * layers, "GatedAct": layers, "Rope": 2 * layers}
    assert record["fusions"]["fuse_gated_act"] == {"count": layers, "refused": []}
    # The first norm of all reads the embedding; the last, in the head, the sum that the last layer ends with.
    norms = record["fusions"]["fuse_add_rms_norm"]
    assert norms["count"] == 2 * layers
    ((name, reason),) = norms["refused"]
    assert name.startswith("layers.0/")
    assert reason == "its input is not a sum"
