"""MoeExperts' body: the reference's numbers in ONNX Runtime, no more work and memory, and TensorRT-RTX builds it."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from moe_bodies import CHOICES, EVERY, TOKENS, WEIGHTS, as_stored, found, kept, layouts, model, poisoned, ran
from moe_cases import FORMATS, LAYOUTS, C, E, I, K, Layout, example, excess
from one_node import rtx_build, session
from op_model import DYNAMIC

from llmexport.export.tensorrt_form import tensorrt_form


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equals_the_reference_at_any_number_of_tokens(dtype, layout):
    stored = example(layout, dtype=dtype)
    runtime = session(model(layout, stored))
    for tokens in TOKENS:
        tensors = example(layout, tokens, dtype) | {n: stored[n] for n in WEIGHTS if n in stored}
        y = found(runtime, tensors)
        assert (y.dtype, y.shape) == (dtype, tensors["x"].shape)
        assert excess(layout(tensors), y) <= 1


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu_erf", "swiglu_clamped"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale_input", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_layout_equals_the_reference(transposed, interleaved, scale_input, bias, activation):
    layout = Layout(activation, transposed, interleaved, scale_input, bias)
    tensors = example(layout)
    assert excess(layout(tensors), found(session(model(layout, tensors)), tensors)) <= 1


@pytest.mark.parametrize(
    ("dtype", "stored"), [("float32", "bfloat16"), ("float32", "float16"), ("float16", "bfloat16")]
)
@pytest.mark.parametrize("layout", ["qwen", "llama4"])
def test_weights_of_another_type_count_as_those_numbers(layout, dtype, stored):
    tensors = example(LAYOUTS[layout], (1, 7), getattr(torch, dtype), getattr(torch, stored))
    assert tensors["down"].dtype != tensors["x"].dtype
    y = found(session(model(LAYOUTS[layout], tensors)), tensors)
    assert excess(LAYOUTS[layout](tensors), y) <= 1


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (4, 4), (16, 1), (32, 4), (128, 1), (256, 8)])
def test_equals_the_reference_at_any_number_of_experts(experts, top_k):
    layout, sizes = LAYOUTS["qwen"], (experts, top_k, 20, 12)
    stored = example(layout, sizes=sizes)
    runtime = session(model(layout, stored))
    for tokens in TOKENS:
        tensors = example(layout, tokens, sizes=sizes) | {n: stored[n] for n in ("gate_up", "down")}
        assert excess(layout(tensors), found(runtime, tensors)) <= 1


@layouts
@pytest.mark.parametrize("experts", CHOICES.values(), ids=CHOICES)
def test_any_choice_equals_the_reference(experts, layout):
    tensors = example(layout, (1, 130), experts=experts, sizes=(E, experts.shape[-1], C, I))
    assert excess(layout(tensors), found(session(model(layout, tensors)), tensors)) <= 1


@layouts
def test_what_tensorrt_is_given_computes_the_same_where_it_runs(layout):
    tensors = example(layout)
    whole = model(layout, tensors)
    y, inlined = (found(session(m), tensors) for m in (whole, tensorrt_form(whole)[0]))
    assert torch.equal(y, inlined)


def test_two_nodes_in_a_graph_keep_apart():
    layout = LAYOUTS["qwen"]
    tensors = example(layout)
    one = model(layout, tensors)
    node = one.graph.node[0]
    second = one.graph.node.add()
    second.CopyFrom(node)
    node.output[0] = second.input[0] = "between"
    second.name = "second"
    twice = layout({**tensors, "x": layout(tensors)})
    for form in (one, tensorrt_form(one)[0]):
        assert excess(twice, found(session(form), tensors)) <= 2


@layouts
def test_no_expert_shows_that_no_token_chose(layout):
    tensors = example(layout, experts=torch.tensor([0, 4, 5]).expand(1, 7, 3))
    expected = found(session(model(layout, tensors)), tensors)
    assert torch.equal(found(session(model(layout, poisoned(tensors, slice(1, 4)))), tensors), expected)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7, 130])
@pytest.mark.parametrize("experts", [16, 64])
def test_multiplies_twice_for_each_block_of_an_experts_tokens(experts, tokens, stored, tmp_path):
    layout = LAYOUTS["qwen"]
    tensors = example(layout, (1, tokens), stored=stored, sizes=(experts, K, 8, 8))
    size = tokens * K * 3 // (2 * experts) + 1
    blocks = sum(math.ceil(n / size) for n in tensors["experts"].flatten().bincount().tolist())
    products = [e for e in ran(model(layout, tensors), tensors, tmp_path) if "MatMul" in e["op_name"]]
    assert len(products) == 2 * blocks


@pytest.mark.parametrize("layout", ["qwen", "llama4", "gpt_oss", "mxfp4", "uint4-zeros"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_onnx_runtime_keeps_weights_as_they_are_stored(dtype, layout, tmp_path):
    tensors = example(EVERY[layout], dtype=dtype, stored=torch.bfloat16)
    assert kept(model(EVERY[layout], tensors), tmp_path) == as_stored(tensors)


rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="pip install tensorrt-rtx")


@rtx
@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.engine
def test_rtx_builds_the_body(dtype, layout, tmp_path):
    tensors = example(layout, dtype=dtype)
    assert rtx_build(model(layout, tensors), DYNAMIC, tmp_path) == ["built"]


@rtx
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rtx_builds_256_experts_whose_weights_are_bf16(dtype, tmp_path):
    # As soon as the number of turns comes from data, it does so for few experts only.
    tensors = example(LAYOUTS["qwen"], dtype=dtype, stored=torch.bfloat16, sizes=(256, 8, 64, 32))
    assert rtx_build(model(LAYOUTS["qwen"], tensors), DYNAMIC, tmp_path) == ["built"]


def test_an_unknown_activation_is_refused():
    layout = Layout("relu")
    with pytest.raises(ValueError, match="'relu'"):
        model(layout, example(layout))


def test_scales_of_another_type_than_the_formats_are_refused():
    layout = FORMATS["fp8"]
    tensors = example(layout)
    with pytest.raises(ValueError, match="fp8 weights are uint8 with scales of float32, not uint8 with uint8"):
        model(layout, tensors | {n: tensors[n].byte() for n in ("gate_up_scales", "down_scales")})
