"""Models that are published with code of their own, which is read about here and never run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from published_configs import PUBLISHED
from tiny_configs import placed_layers, read, refusal, rotary

from llmexport.export import archs, random_checkpoint
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.errors import ExportError
from llmexport.export.onnx_file import read_model, read_noted
from llmexport.export.spec import PAST, SEQUENCE, Alibi, Attention, DynamicScaling, Head, Mask, Mlp, Norm, Rotary
from llmexport.validate.compare import compare
from llmexport.validate.runners import to_torch

CODED = {name: c for name, c in PUBLISHED.items() if archs.choose(None, c).reference.made_by}


def parts(name: str) -> tuple[Attention, Mlp, tuple[Any, ...], Head]:
    """What all layers of a published model hold and read, and its head."""
    model = read_model(archs.choose(None, PUBLISHED[name]), PUBLISHED[name])
    [(attention, mlp, reads)] = {(x.mixer, x.mlp, x.reads) for x in placed_layers(model)}
    return attention, mlp, reads, model.steps[-1].block


NORM = Norm(4096, 1e-6)
RATIO = 10000.0 * 10000
READ = {
    "Baichuan-7B": (
        Attention(4096, 32, 32, 128, fused=True), Mlp(4096, 11008, "silu"),
        (Rotary(128, 10000.0), Mask()), Head(NORM, 64000),
    ),
    "Baichuan2-7B": (
        Attention(4096, 32, 32, 128, fused=True), Mlp(4096, 11008, "silu"),
        (Rotary(128, 10000.0), Mask()), Head(NORM, 125696, normed=True),
    ),
    "Baichuan-13B": (
        Attention(5120, 40, 40, 128, fused=True, rotated=0, biased=True), Mlp(5120, 13696, "silu"),
        (Alibi(40),), Head(Norm(5120, 1e-6), 64000),
    ),
    "Baichuan2-13B": (
        Attention(5120, 40, 40, 128, fused=True, rotated=0, biased=True), Mlp(5120, 13696, "silu"),
        (Alibi(40),), Head(Norm(5120, 1e-6), 125696, normed=True),
    ),
    "internlm-7b": (
        Attention(4096, 32, 32, 128, qkv_bias=True, out_bias=True), Mlp(4096, 11008, "silu"),
        (Rotary(128, 10000.0, places=2048), Mask()), Head(NORM, 103168),
    ),
    "internlm2_5-7b": (
        Attention(4096, 32, 8, 128, fused=True, grouped=True), Mlp(4096, 14336, "silu"),
        (Rotary(128, 1000000.0, DynamicScaling(2.0, 32768)), Mask()), Head(Norm(4096, 1e-5), 92544),
    ),
    "internlm3-8b-instruct": (
        Attention(4096, 32, 2, 128), Mlp(4096, 10240, "silu"),
        (Rotary(128, 50000000.0, DynamicScaling(6.0, 32768)), Mask()), Head(Norm(4096, 1e-5), 128512),
    ),
    "Qwen-7B": (
        Attention(4096, 32, 32, 128, fused=True, qkv_bias=True), Mlp(4096, 11008, "silu"),
        (Rotary(128, 10000.0, places=8192), Mask()), Head(NORM, 151936),
    ),
    "Qwen-72B": (
        Attention(8192, 64, 64, 128, fused=True, qkv_bias=True), Mlp(8192, 24576, "silu"),
        (Rotary(128, 1000000.0), Mask()), Head(Norm(8192, 1e-6), 152064),
    ),
    "chatglm3-6b": (
        Attention(4096, 32, 2, 128, fused=True, qkv_bias=True, rotated=64, interleaved=True),
        Mlp(4096, 13696, "silu", fused=True), (Rotary(64, 10000.0), Mask()), Head(Norm(4096, 1e-5), 65024),
    ),
    "chatglm-6b": (
        Attention(4096, 32, 32, 128, fused=True, grouped=True, qkv_bias=True, out_bias=True, halves=True),
        Mlp(4096, 16384, "gelu_tanh", bias=True, gated=False),
        (Rotary(128, 10000.0, halves=True), Mask(prefixed=True)),
        Head(Norm(4096, 1e-5, statistics="layer", bias=True), 130528),
    ),
    "glm-4-9b-chat-1m": (
        Attention(4096, 32, 4, 128, fused=True, qkv_bias=True, rotated=64, interleaved=True),
        Mlp(4096, 13696, "silu", fused=True), (Rotary(64, RATIO), Mask()), Head(Norm(4096, 1.5625e-7), 151552),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_a_published_config_reads_as(name):
    assert parts(name) == READ[name]


@pytest.mark.parametrize("name", CODED)
def test_other_code_beside_the_weights_is_refused(name):
    config = PUBLISHED[name]
    other = {**config.get("auto_map", {}), "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    with pytest.raises(ExportError, match="only the code of configuration_"):
        read_model(archs.choose(None, config), config | {"auto_map": other})


# Tensors as the hub has them, and how many there are.
LAYOUTS = {
    "Baichuan2-13B": (283, {
        "model.layers.39.self_attn.W_pack.weight": (15360, 5120), "lm_head.weight": (125696, 5120),
        "model.layers.0.mlp.gate_proj.weight": (13696, 5120), "model.embed_tokens.weight": (125696, 5120),
    }),
    "internlm-7b": (419, {
        "model.layers.31.self_attn.o_proj.bias": (4096,), "model.layers.0.self_attn.q_proj.bias": (4096,),
    }),
    "internlm2_5-7b": (227, {
        "model.layers.31.attention.wqkv.weight": (6144, 4096), "model.layers.0.attention.wo.weight": (4096, 4096),
        "model.layers.0.feed_forward.w1.weight": (14336, 4096), "model.layers.0.feed_forward.w2.weight": (4096, 14336),
        "model.layers.0.attention_norm.weight": (4096,), "model.layers.0.ffn_norm.weight": (4096,),
        "model.tok_embeddings.weight": (92544, 4096), "output.weight": (92544, 4096), "model.norm.weight": (4096,),
    }),
    "internlm3-8b-instruct": (435, {"model.layers.47.self_attn.k_proj.weight": (256, 4096)}),
    "Qwen-7B": (259, {
        "transformer.h.31.attn.c_attn.weight": (12288, 4096), "transformer.h.31.attn.c_attn.bias": (12288,),
        "transformer.h.0.attn.c_proj.weight": (4096, 4096), "transformer.h.0.mlp.w1.weight": (11008, 4096),
        "transformer.h.0.mlp.w2.weight": (11008, 4096), "transformer.h.0.mlp.c_proj.weight": (4096, 11008),
        "transformer.h.0.ln_1.weight": (4096,), "transformer.h.0.ln_2.weight": (4096,),
        "transformer.ln_f.weight": (4096,), "transformer.wte.weight": (151936, 4096), "lm_head.weight": (151936, 4096),
    }),
    "chatglm3-6b": (199, {
        "transformer.encoder.layers.27.self_attention.query_key_value.weight": (4608, 4096),
        "transformer.encoder.layers.27.self_attention.query_key_value.bias": (4608,),
        "transformer.encoder.layers.0.self_attention.dense.weight": (4096, 4096),
        "transformer.encoder.layers.0.mlp.dense_h_to_4h.weight": (27392, 4096),
        "transformer.encoder.layers.0.mlp.dense_4h_to_h.weight": (4096, 13696),
        "transformer.encoder.layers.0.input_layernorm.weight": (4096,),
        "transformer.encoder.layers.0.post_attention_layernorm.weight": (4096,),
        "transformer.encoder.final_layernorm.weight": (4096,),
        "transformer.embedding.word_embeddings.weight": (65024, 4096), "transformer.output_layer.weight": (65024, 4096),
    }),
    "chatglm-6b": (340, {
        "transformer.layers.27.attention.query_key_value.weight": (12288, 4096),
        "transformer.layers.27.attention.query_key_value.bias": (12288,),
        "transformer.layers.0.attention.dense.weight": (4096, 4096),
        "transformer.layers.0.mlp.dense_h_to_4h.weight": (16384, 4096),
        "transformer.layers.0.mlp.dense_4h_to_h.bias": (4096,),
        "transformer.layers.0.input_layernorm.bias": (4096,),
        "transformer.layers.0.post_attention_layernorm.weight": (4096,),
        "transformer.final_layernorm.bias": (4096,), "transformer.word_embeddings.weight": (130528, 4096),
        "lm_head.weight": (130528, 4096),
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_checkpoint_holds_the_published_tensors(name, tmp_path):
    random_checkpoint.write(archs.choose(None, PUBLISHED[name]), tmp_path / "ck", config=PUBLISHED[name], hollow=True)
    held = {n: tuple(t.shape) for n, t in open_checkpoint(tmp_path / "ck").tensors.items()}
    count, known = LAYOUTS[name]
    assert known.items() <= held.items()
    assert len(held) == count


@pytest.mark.parametrize(
    ("arch", "key"),
    [("internlm", "rotary"), ("qwen", "use_dynamic_ntk and use_logn_attn")],
)
def test_angles_that_change_with_the_length_are_exported_as_far_as_they_do_not(arch, key):
    model, notes = read_noted(archs.load(arch), archs.load(arch).tiny)
    assert notes == [f"config.json: {key} changes longer texts alone: the export is of texts up to 512 tokens"]
    assert rotary(model).most == {SEQUENCE: 512, PAST: 511}


def test_angles_that_do_not_change_have_no_end():
    assert rotary(read("qwen", use_dynamic_ntk=False, use_logn_attn=False)).most == {}
    assert rotary(read("internlm", rotary={"base": 10000, "type": "origin"})).most == {}


@pytest.mark.parametrize(
    ("arch", "changes", "why"),
    [
        ("chatglm", {"multi_query_attention": False}, "multi_query_attention is False"),
        ("chatglm", {"apply_residual_connection_post_layernorm": True}, "only False is supported"),
        ("chatglm", {"rmsnorm": False}, "rmsnorm is False"),
        ("chatglm", {"quantization_bit": 4}, "quantization_bit is 4"),
        ("chatglm", {"position_encoding_2d": True, "inner_hidden_size": 16384}, "inner_hidden_size=16384"),
        ("chatglm_6b", {"position_encoding_2d": False}, "position_encoding_2d is False, only True"),
        ("chatglm_6b", {"quantization_bit": 4}, "quantization_bit is 4"),
        ("chatglm_6b", {"pre_seq_len": 128}, "pre_seq_len is 128"),
        ("chatglm_6b", {"gmask_token_id": None}, "no 'gmask_token_id'"),
        ("chatglm_6b", {"num_attention_heads": 5}, "hidden_size 64 is not a multiple of 5 attention heads"),
        ("chatglm_6b", {"multi_query_attention": True}, "multi_query_attention=True"),
        ("qwen", {"rotary_pct": 0.5}, "rotary_pct is 0.5"),
        ("qwen", {"intermediate_size": 191}, "the widths of w1 and w2 together"),
        ("internlm", {"rotary": {"base": 10000, "type": "yarn"}}, "expected a base and a type"),
        ("internlm2", {"rope_parameters": {"rope_type": "ntk", "factor": 2.0}}, "RoPE of type 'ntk' is not supported"),
    ],
)
def test_what_their_code_does_otherwise_is_refused(arch, changes, why):
    assert why in refusal(arch, **changes)


def test_a_slope_is_that_of_the_paper():
    """Eight heads halve from 1/2 on (arXiv 2108.12409, section 3); what lies between is of twice as many."""
    from llmexport.validate.references.baichuan import _slopes

    assert _slopes(8) == [2.0**-i for i in range(1, 9)]
    assert _slopes(12)[8:] == [2.0 ** (-i / 2) for i in (1, 3, 5, 7)]
    assert math.prod(_slopes(1)) == 2.0**-8


def test_a_reference_has_the_norms_of_a_checkpoint_in_16_bits(tmp_path):
    """Gemma's are Grok's less one, which bfloat16 holds of few."""
    from llmexport.validate import references

    random_checkpoint.write(archs.load("grok"), tmp_path / "ck", dtype="bfloat16")
    checkpoint = open_checkpoint(tmp_path / "ck")
    config, tensors = checkpoint.config, {n: to_torch(checkpoint.read(n).copy()) for n in checkpoint.tensors}
    scale = tensors["model.layers.0.pre_attn_norm.scale"].mul_(0.1).float()
    made = references.make("grok", config, tensors, torch.float32, None)
    weight = made.model.layers[0].input_layernorm.weight
    assert compare(scale.numpy(), (1 + weight).detach().numpy()).max_abs <= 1e-6
