"""Blocks as values, the model as steps, and what the checkpoint calls each weight."""

import dataclasses
import json
import typing
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from arch_cases import CASES, TOWERS, Case
from spec_blocks import ATTENTION, BLOCKS, NORM

from llmexport.export import archs
from llmexport.export.assembly import (
    TABLE,
    alone,
    checkpoint_name,
    find_block,
    named_blocks,
    older_name,
    part_names,
    parts,
)
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.errors import ExportError
from llmexport.export.onnx_file import read_model
from llmexport.export.spec import (
    BATCH,
    PAST,
    SEQUENCE,
    TOTAL,
    Assembly,
    Block,
    Layer,
    Mixer,
    Model,
    Norm,
    Port,
    Rotary,
    Scaling,
    Step,
    Sublayer,
    causal_lm,
    from_data,
    to_data,
)
from llmexport.export.static import StaticCache
from llmexport.export.trace import module_shapes
from llmexport.export.weights import Parameter

# Base of attention and the gated delta net: no block of its own.
KINDS = {kind: cls for kind, cls in Block.kinds.items() if cls is not Mixer}
cases = pytest.mark.parametrize("case", CASES, ids=str)


def model_of(case: Case | str, slots: int | None = None) -> Model:
    case = Case(case, case) if isinstance(case, str) else case
    return read_model(
        archs.load(case.arch), {**archs.load(case.arch).tiny, **case.changes}, slots and StaticCache(slots)
    )


def wanted_shapes(
    case: Case, folder: Path, steps: Callable[[Model], list[Step]]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors that these steps of the model take from a checkpoint: name and shape of each."""
    checkpoint = open_checkpoint(folder)
    arch = archs.choose(None, checkpoint.config)
    model = read_model(archs.load(case.arch), checkpoint.config)
    for step in steps(model):
        for path, shape in module_shapes(step.block).items():
            name = checkpoint_name(arch, model, step.path + path)
            name = name if name in checkpoint.tensors else older_name(arch, name)
            stacked = () if name in checkpoint.tensors else part_names(arch, step.path + path, shape[0])
            parameter = Parameter(name, shape, stacked)
            yield from ((n, parameter.part_shape) for n in parameter.sources)


def same(block: Block) -> Block:
    """An equal block that is another object, down to its parts."""
    return from_data(json.loads(json.dumps(to_data(block))))


def test_a_block_comes_back_from_json():
    assert [b for b in BLOCKS if same(b) != b] == []


def test_equal_blocks_are_one_key():
    assert [b for b in BLOCKS if same(b) not in {b: 1}] == []


def test_blocks_that_differ_in_one_field_differ():
    assert len(set(BLOCKS)) == len(BLOCKS)


def test_blocks_that_differ_have_different_data():
    assert len({json.dumps(to_data(b)) for b in BLOCKS}) == len(BLOCKS)


@pytest.mark.parametrize("value", [Port("x", ("batch", "sequence", 64), use="logits"), causal_lm("LlamaForCausalLM")])
def test_a_port_and_a_reference_come_back_from_json(value):
    assert from_data(json.loads(json.dumps(to_data(value)))) == value


def test_data_of_an_unknown_class_is_refused():
    with pytest.raises(KeyError, match="Unheard"):
        from_data({"is": "Unheard", "size": 3})


def test_a_block_of_a_module_imported_later_comes_back_from_json(monkeypatch):
    monkeypatch.setattr(Block, "kinds", dict(Block.kinds))

    @dataclasses.dataclass(frozen=True)
    class Later(Block):
        size: int

    assert same(Later(3)) == Later(3)


ROWS: dict[str, object] = {"statistics": "layer", "rows": 4}


@pytest.mark.parametrize(
    "fields", [{"rows": 4}, {"bias": True}, ROWS | {"weighted": False}, ROWS | {"bias": True}], ids=str
)
def test_a_norm_that_no_module_computes_is_a_mistake(fields):
    with pytest.raises(ValueError, match="a norm with rows or a bias is a LayerNorm; one with rows has weights"):
        Norm(64, 1e-6, **fields)


def test_a_layer_whose_sublayers_would_share_what_each_needs_is_a_mistake():
    twice = (Sublayer("first", ATTENTION, NORM), Sublayer("second", ATTENTION, NORM))
    with pytest.raises(ValueError, match=r"two sublayers give the same of .*present_key"):
        Layer(twice)
    with pytest.raises(ValueError, match="added to the layer's input as it is"):
        Layer((Sublayer("self_attn", ATTENTION, NORM, kept=2.0),), parallel=True)


def test_a_mask_alone_can_be_a_bias_and_a_fused_matrix_alone_be_grouped():
    for fields in ({"biased": True, "sinks": True}, {"biased": True, "masked": False}, {"grouped": True}):
        with pytest.raises(ValueError, match="only a mask can be a bias, and only a fused matrix be grouped"):
            dataclasses.replace(ATTENTION, cached=False, **fields)


def test_a_block_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        NORM.size = 3


def test_every_kind_of_block_is_tested_here():
    assert {b.kind for b in BLOCKS} == KINDS.keys()


def test_every_kind_of_block_occurs_in_a_case():
    wholes = [(arch := archs.load(c.arch), archs.tiny_config(arch, "all")) for c in TOWERS]
    models = [*map(model_of, CASES), model_of("llama", slots=64), *(read_model(*w, part="all") for w in wholes)]
    found = {part.block.kind for model in models for step in model.steps for part in parts(step)}
    assert found == KINDS.keys()


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_field_of_every_kind_of_block_has_two_values_here(kind):
    blocks = [b for b in BLOCKS if b.kind == kind]
    fields = {f.name for f in dataclasses.fields(KINDS[kind])}
    # Those of another kind, which it inherits, have them there.
    for base in {*KINDS.values()} & {*KINDS[kind].__mro__[1:]}:
        fields -= {f.name for f in dataclasses.fields(base)}
    assert [f for f in fields if len({getattr(b, f) for b in blocks}) < 2] == []


def test_every_scaling_of_rope_is_tested_here():
    scaled = {type(b.scaling) for b in BLOCKS if isinstance(b, Rotary)}
    assert scaled == {*typing.get_args(Scaling), type(None)}


@cases
def test_every_step_reads_what_is_there_already(case):
    assembly = model_of(case).graphs[0].assembly
    there = {p.name for p in assembly.inputs}
    for step in assembly.steps:
        assert set(step.inputs) <= there
        there |= set(step.outputs)
    assert {p.name for p in assembly.outputs} <= there


@cases
def test_every_value_is_made_once(case):
    assembly = model_of(case).graphs[0].assembly
    made = [p.name for p in assembly.inputs] + [n for s in assembly.steps for n in s.outputs]
    assert len(made) == len(set(made))


@cases
def test_maker_and_readers_agree_on_the_shape_of_a_value(case):
    assembly = model_of(case).graphs[0].assembly
    shapes: dict[str, set[Any]] = {p.name: {(p.shape, p.dtype)} for p in (*assembly.inputs, *assembly.outputs)}
    for step in assembly.steps:
        for names, ports in ((step.inputs, step.block.inputs), (step.outputs, step.block.outputs)):
            for name, port in zip(names, ports, strict=True):
                shapes.setdefault(name, set()).add((port.shape, port.dtype))
    assert {n: s for n, s in shapes.items() if len(s) > 1} == {}


def test_the_model_has_the_names_that_people_know():
    assembly = model_of("llama").graphs[0].assembly
    pairs = [(i, kind) for i in range(3) for kind in ("key", "value")]
    inputs = ["input_ids", "position_ids", "attention_mask", *(f"past_key_values.{i}.{p}" for i, p in pairs)]
    assert [p.name for p in assembly.inputs] == inputs
    assert [p.name for p in assembly.outputs] == ["logits", *(f"present.{i}.{p}" for i, p in pairs)]


def test_a_model_of_gated_delta_nets_has_their_states_beside_keys_and_values():
    ports = {p.name: (p.shape, p.dtype) for p in model_of("qwen3_5_moe").graphs[0].assembly.inputs}
    states = {"conv_state": ((BATCH, 3, 128), "T"), "recurrent_state": ((BATCH, 4, 16, 16), "float32")}
    cache = dict.fromkeys(("key", "value"), ((BATCH, 2, PAST, 32), "T"))
    assert ports == {
        "input_ids": ((BATCH, SEQUENCE), "int64"),
        # mRoPE: time, height and width of every token.
        "position_ids": ((3, BATCH, SEQUENCE), "int64"),
        "attention_mask": ((BATCH, TOTAL), "int64"),
        **{f"past_key_values.{i}.{n}": port for i in range(3) for n, port in states.items()},
        **{f"past_key_values.3.{n}": port for n, port in cache.items()},
    }


def kinds(assembly: Assembly) -> list[str]:
    return [b.kind for b in assembly.blocks]


@pytest.mark.parametrize("arch", ["gemma", "llama", "mistral"])
def test_equal_layers_are_one_block(arch):
    assembly = model_of(arch).graphs[0].assembly
    assert len([s for s in assembly.steps if s.block.kind == "layer"]) == 3
    assert kinds(assembly) == ["embedding", "rotary", "mask", "layer", "head"]


def test_layers_of_two_windows_are_one_block_and_two_masks():
    assembly = model_of("qwen2").graphs[0].assembly
    assert kinds(assembly) == ["embedding", "rotary", "mask", "mask", "layer", "head"]


def test_a_layer_reads_the_mask_of_its_window():
    steps = {s.name: s for s in model_of("qwen2").steps}
    assert [steps[f"layers.{i}"].inputs[3] for i in range(3)] == ["mask", "mask_window_8", "mask_window_8"]


# What the layers read besides the hidden states and their cache, of the cases that mix kinds of layers.
READS = {
    "gpt_oss": [("cos", "sin", "start", "length")] * 3,
    "llama4": [("cos", "sin", "mask_chunk_8")] * 3 + [("mask", "temperature")],
    "llama4-maverick": [("cos", "sin", "mask_chunk_8"), ("mask",)] * 2,
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe"), [("present_tokens", "tokens_end")] * 3 + [("cos", "sin", "mask")]),
    "gemma2": [("cos", "sin", "start", "length")] * 3,
    "gemma2-no-caps": [("cos", "sin", "mask_window_8"), ("cos", "sin", "mask"), ("cos", "sin", "mask_window_8")],
    "gemma3_text": [("cos", "sin", "mask_window_8"), ("cos_1", "sin_1", "mask"), ("cos", "sin", "mask_window_8")],
}


@pytest.mark.parametrize("name", READS)
def test_a_layer_reads_what_its_kind_of_layer_reads(name):
    model = model_of(next(c for c in CASES if c.name == name))
    steps = [s for s in model.steps if isinstance(s.block, Layer)]
    contexts = [s.inputs[1 : len(s.inputs) - len(s.block.states)] for s in steps]
    assert contexts == READS[name]


def test_layers_that_turn_by_other_angles_are_one_block():
    blocks = model_of("gemma3_text").graphs[0].assembly.blocks
    assert sum(isinstance(b, Layer) for b in blocks) == 1
    assert [b.theta for b in blocks if isinstance(b, Rotary)] == [10000.0, 1000000.0]


def test_layers_whose_window_is_part_of_their_attention_are_two_blocks():
    layers = [b for b in model_of("gpt_oss").graphs[0].assembly.blocks if isinstance(b, Layer)]
    assert [layer.sublayers[0].block.window for layer in layers] == [8, 0]


def test_a_block_alone_has_its_ports_for_values():
    assembly = alone(find_block(model_of("llama"), "mlp")).assembly
    assert ([p.name for p in assembly.inputs], [p.name for p in assembly.outputs]) == (["normed"], ["mixed"])
    assert assembly.steps[0].path == "layers.0.mlp."


def test_the_kinds_of_a_dense_model_have_names():
    names = ["embedding", "rotary", "mask", "layer", "norm", "attention", "mlp", "head"]
    assert list(named_blocks(model_of("gemma"))) == names


def test_the_second_of_a_kind_is_named_by_its_place():
    assert list(named_blocks(model_of("qwen2")))[2:5] == ["mask", "mask_window_8", "layer"]


def test_a_mask_without_a_window_does_not_hide_one_that_comes_first():
    names = list(named_blocks(model_of("gemma3_text")))
    assert names[:5] == ["embedding", "rotary", "mask_window_8", "rotary_1", "mask"]


def test_the_parts_of_a_mixture_of_experts_have_names():
    assert {"moe", "router", "experts", "shared_expert"} <= set(named_blocks(model_of("qwen2_moe")))


def test_the_parts_of_a_gated_delta_net_have_names():
    assert {"presence", "gated_delta_net", "causal_conv", "gated_norm"} <= set(named_blocks(model_of("qwen3_5_moe")))


@cases
def test_every_block_of_a_model_has_one_name(case):
    model = model_of(case)
    blocks = [s.block for s in named_blocks(model).values()]
    assert len(blocks) == len(set(blocks))
    assert set(blocks) == {part.block for step in model.steps for part in parts(step)}


def test_an_unknown_block_is_refused_with_the_names_there_are():
    with pytest.raises(ExportError, match=r"no block 'moe' in this model, its blocks are: embedding, .*mlp"):
        find_block(model_of("llama"), "moe")


@cases
def test_weights_are_those_that_transformers_saves(case, tiny_checkpoint):
    folder = tiny_checkpoint(case)
    found = list(wanted_shapes(case, folder, lambda model: list(model.steps)))
    model = model_of(case)
    # The embedding's table, which a tied head takes again, and each side of an encoder-decoder.
    names = [n for n, _ in found]
    assert len(names) - len(set(names)) == list(model.ties.values()).count(TABLE)
    ignored = archs.load(case.arch).ignore
    saved = {n: t.shape for n, t in open_checkpoint(folder).tensors.items()}
    assert dict(found) == {n: s for n, s in saved.items() if n in names or not any(fnmatch(n, p) for p in ignored)}


@cases
def test_weights_of_a_block_alone_are_those_that_transformers_saves(case, tiny_checkpoint):
    folder = tiny_checkpoint(case)
    saved = {n: t.shape for n, t in open_checkpoint(folder).tensors.items()}
    found = dict(wanted_shapes(case, folder, lambda model: list(named_blocks(model).values())))
    assert {n: saved.get(n) for n in found} == found


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
    assert checkpoint_name(archs.load("llama"), model_of("llama"), path) == name


@pytest.mark.parametrize(
    ("arch", "path", "name"),
    [
        ("glm4", "layers.3.self_attn_output_norm.weight", "model.layers.3.post_self_attn_layernorm.weight"),
        ("gemma2", "layers.3.self_attn_output_norm.weight", "model.layers.3.post_attention_layernorm.weight"),
        ("gemma2", "layers.3.mlp_input_norm.weight", "model.layers.3.pre_feedforward_layernorm.weight"),
        ("mixtral", "layers.3.mlp.router.weight", "model.layers.3.block_sparse_moe.gate.weight"),
        ("qwen2_moe", "layers.3.mlp.shared_expert.gate.weight", "model.layers.3.mlp.shared_expert_gate.weight"),
        ("qwen2_moe", "layers.3.mlp.shared_expert.up_proj.weight", "model.layers.3.mlp.shared_expert.up_proj.weight"),
        ("gpt_oss", "layers.3.mlp.experts.down_proj_scales", "model.layers.3.mlp.experts.down_proj_scales"),
        ("llama4", "layers.3.mlp.experts.gate_up_proj", "model.layers.3.feed_forward.experts.gate_up_proj"),
    ],
)
def test_an_architecture_has_its_own_names(arch, path, name):
    assert checkpoint_name(archs.load(arch), model_of(arch), path) == name


@pytest.mark.parametrize(
    ("arch", "path", "name"),
    [
        ("llama4", "layers.3.mlp.router.weight", "language_model.model.layers.3.feed_forward.router.weight"),
        ("llama4", "head.projection.weight", "language_model.lm_head.weight"),
        ("qwen3_5_moe", "layers.3.self_attn.q_norm.weight", "model.language_model.layers.3.self_attn.q_norm.weight"),
        ("qwen3_5_moe", "head.projection.weight", "lm_head.weight"),
        ("qwen3_5", "layers.3.mlp.up_proj.weight", "model.language_model.layers.3.mlp.up_proj.weight"),
    ],
)
def test_a_multimodal_checkpoint_has_the_text_models_names_under_its_own(arch, path, name):
    model_type = archs.load(arch).multimodal[0].model_type
    named = archs.choose(None, {"model_type": model_type})
    assert (named.name, checkpoint_name(named, model_of(arch), path)) == (arch, name)


def test_parts_of_a_stack_go_expert_by_expert_and_gate_before_up():
    start = "model.layers.1.block_sparse_moe.experts."
    names = [f"{start}{e}.{w}.weight" for e in range(2) for w in ("w1", "w3")]
    assert list(part_names(archs.load("mixtral"), "layers.1.mlp.experts.gate_up_proj", 2)) == names


def test_parts_of_a_stack_are_renamed_in_a_multimodal_checkpoint():
    arch = archs.choose(None, {"model_type": "qwen3_5_moe"})
    [name] = part_names(arch, "layers.1.mlp.experts.down_proj", 1)
    assert name == "model.language_model.layers.1.mlp.experts.0.down_proj.weight"


def test_a_parameter_that_is_no_stack_has_no_parts():
    assert part_names(archs.load("mixtral"), "layers.1.mlp.router.weight", 4) == ()


def test_a_tied_head_is_the_embedding():
    name = checkpoint_name(archs.load("gemma"), model_of("gemma"), "head.projection.weight")
    assert name == "model.embed_tokens.weight"


def test_a_path_that_the_architecture_does_not_name_is_refused():
    with pytest.raises(KeyError, match="vision"):
        checkpoint_name(archs.load("llama"), model_of("llama"), "vision.patch.weight")
