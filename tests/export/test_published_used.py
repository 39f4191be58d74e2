"""The most used models of 2025: their published configs to the last number, and their layouts at full size."""

from __future__ import annotations

from pathlib import Path

import pytest
from published_configs import PUBLISHED
from tiny_configs import placed_layers, read, refusal, rotary, windows

from llmexport.export import archs, random_checkpoint
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.onnx_file import Request, open_model, read_model
from llmexport.export.spec import (
    Attention,
    Block,
    Embedding,
    Experts,
    GatedDeltaNet,
    Head,
    Layer,
    LongScaling,
    Mask,
    Mlp,
    Model,
    Moe,
    Norm,
    Presence,
    Rotary,
    Router,
    SharedExpert,
    Sublayer,
    Temperature,
    YarnScaling,
    decoder_layer,
)
from llmexport.export.stack import wired

Layers = tuple[tuple[Layer, tuple[Block, ...]], ...]


def model(vocabulary: int, norm: Norm, layers: Layers, *, tied: bool, scale: float = 1.0, logits: float = 1.0) -> Model:
    embedding, head = Embedding(vocabulary, norm.size, scale), Head(norm, vocabulary, scale=logits)
    return wired(embedding, layers, head, tied=tied)


def qwen3_30b() -> Model:
    norm = Norm(2048, 1e-6)
    moe = Moe(Router(2048, 128, 8, "softmax", renormalise=True), Experts(2048, 768, 128, 8))
    block = decoder_layer(norm, Attention(2048, 32, 4, 128, qk_norm=Norm(128, 1e-6)), norm, moe)
    return model(151936, norm, ((block, (Rotary(128, 1000000.0), Mask())),) * 48, tied=False)


def olmo_3_7b() -> Model:
    norm = Norm(4096, 1e-6, rounding="after_weight")
    attention = Attention(4096, 32, 32, 128, qk_norm=norm, qk_norm_over="all_heads")
    block = decoder_layer(None, attention, None, Mlp(4096, 11008, "silu"), norm, norm)
    yarn = YarnScaling(8.0, 8192, 32.0, 1.0, True, 1.2079441541679836)
    slides, full = (block, (Rotary(128, 500000.0), Mask(4096))), (block, (Rotary(128, 500000.0, yarn), Mask()))
    return model(100278, norm, (slides, slides, slides, full) * 8, tied=False)


def granite_3_8b() -> Model:
    norm = Norm(4096, 1e-5)
    attention = Attention(4096, 32, 8, 128, scale=0.0078125)
    sublayers = (("self_attn", attention), ("mlp", Mlp(4096, 12800, "silu")))
    block = Layer(tuple(Sublayer(name, b, norm, scale=0.22) for name, b in sublayers))
    layers = ((block, (Rotary(128, 10000000.0), Mask())),) * 40
    return model(49159, norm, layers, tied=True, scale=12.0, logits=1 / 16)


def smollm3_3b() -> Model:
    norm, mlp = Norm(2048, 1e-6), Mlp(2048, 11008, "silu")
    turns = decoder_layer(norm, Attention(2048, 16, 4, 128), norm, mlp)
    straight = decoder_layer(norm, Attention(2048, 16, 4, 128, rotated=0), norm, mlp)
    three, fourth = (turns, (Rotary(128, 5000000.0), Mask())), (straight, (Mask(),))
    return model(128256, norm, (three, three, three, fourth) * 9, tied=True)


def seed_oss_36b() -> Model:
    norm = Norm(5120, 1e-6)
    block = decoder_layer(norm, Attention(5120, 80, 8, 128, qkv_bias=True), norm, Mlp(5120, 27648, "silu"))
    return model(155136, norm, ((block, (Rotary(128, 10000000.0), Mask())),) * 64, tied=False)


def ernie_4_5() -> Model:
    norm = Norm(1024, 1e-5)
    block = decoder_layer(norm, Attention(1024, 16, 2, 128, interleaved=True), norm, Mlp(1024, 3072, "silu"))
    return model(103424, norm, ((block, (Rotary(128, 500000.0), Mask())),) * 18, tied=True)


def hunyuan_7b() -> Model:
    norm = Norm(4096, 1e-5)
    attention = Attention(4096, 32, 8, 128, qk_norm=Norm(128, 1e-5), qk_norm_place="after_rotary")
    block = decoder_layer(norm, attention, norm, Mlp(4096, 14336, "silu"))
    layers = ((block, (Rotary(128, 10000.0 * 1000.0 ** (128 / 126)), Mask())),) * 32
    return model(128167, norm, layers, tied=True)


def command_r7b() -> Model:
    norm, mlp = Norm(4096, 1e-5, statistics="layer"), Mlp(4096, 14336, "silu")
    turns, straight = (
        decoder_layer(norm, Attention(4096, 32, 8, 128, interleaved=True, rotated=r), None, mlp, parallel=True)
        for r in (None, 0)
    )
    slides = (turns, (Rotary(128, 50000.0), Mask(4096)))
    return model(256000, norm, (slides, slides, slides, (straight, (Mask(),))) * 8, tied=True, logits=0.25)


def glm_4_5_air() -> Model:
    norm = Norm(4096, 1e-5)
    router = Router(4096, 128, 8, "sigmoid", renormalise=True, correction=True, wide=True)
    moe = Moe(router, Experts(4096, 1408, 128, 8), SharedExpert(Mlp(4096, 1408, "silu")))
    attention = Attention(4096, 96, 8, 128, qkv_bias=True, rotated=64)
    dense, sparse = (decoder_layer(norm, attention, norm, mlp) for mlp in (Mlp(4096, 10944, "silu"), moe))
    reads = (Rotary(64, 1000000.0), Mask())
    return model(151552, norm, ((dense, reads), *((sparse, reads),) * 45), tied=False)


def minimax_m2() -> Model:
    norm = Norm(3072, 1e-6)
    router = Router(3072, 256, 8, "sigmoid", renormalise=True, correction=True)
    attention = Attention(3072, 48, 8, 128, rotated=64, qk_norm=norm, qk_norm_over="all_heads")
    block = decoder_layer(norm, attention, norm, Moe(router, Experts(3072, 1536, 256, 8)))
    return model(200064, norm, ((block, (Rotary(64, 5000000.0), Mask())),) * 62, tied=False)


def qwen3_next_80b() -> Model:
    norm, heads = (Norm(size, 1e-6, 1.0, "after_weight") for size in (2048, 256))
    moe = Moe(
        Router(2048, 512, 10, "softmax", renormalise=True),
        Experts(2048, 512, 512, 10),
        SharedExpert(Mlp(2048, 512, "silu"), gated=True),
    )
    net = GatedDeltaNet(2048, 16, 128, 32, 128, kernel=4, epsilon=1e-6, grouped=True)
    attention = Attention(2048, 16, 2, 256, rotated=64, qk_norm=heads, output_gate=True)
    linear = (decoder_layer(norm, net, norm, moe), (Presence(),))
    full = (decoder_layer(norm, attention, norm, moe), (Rotary(64, 5000000.0), Mask()))
    return model(151936, norm, (linear, linear, linear, full) * 12, tied=False)


def ministral_3_3b() -> Model:
    norm = Norm(3072, 1e-5)
    block = decoder_layer(norm, Attention(3072, 32, 8, 128, temperature=True), norm, Mlp(3072, 9216, "silu"))
    # Both mscales are 1, so that angles keep their magnitude.
    yarn = YarnScaling(16.0, 16384, 32.0, 1.0, True, 1.0)
    reads = (Rotary(128, 1000000.0, yarn), Temperature(16384, 0.1, placed=True), Mask())
    return model(131072, norm, ((block, reads),) * 26, tied=True)


def phi_3_5_moe() -> Model:
    norm, said = Norm(4096, 1e-5, statistics="layer", bias=True), PUBLISHED["Phi-3.5-MoE-instruct"]["rope_scaling"]
    moe = Moe(Router(4096, 16, 2, "sparse_mixer", jitter=0.01), Experts(4096, 6400, 16, 2))
    block = decoder_layer(norm, Attention(4096, 32, 8, 128, qkv_bias=True, out_bias=True), norm, moe)
    # Both magnitudes are one number.
    scaling = LongScaling(tuple(said["short_factor"]), tuple(said["long_factor"]), 4096, 1.243163121016122)
    embedding, head = Embedding(32064, 4096), Head(norm, 32064, bias=True)
    return wired(embedding, ((block, (Rotary(128, 10000.0, scaling), Mask(131072))),) * 32, head, tied=False)


MODELS = {
    "Qwen3-30B-A3B": qwen3_30b(),
    "Olmo-3-7B": olmo_3_7b(),
    "granite-3.3-8b": granite_3_8b(),
    "SmolLM3-3B": smollm3_3b(),
    "Seed-OSS-36B": seed_oss_36b(),
    "ERNIE-4.5-0.3B": ernie_4_5(),
    "Hy-MT2-7B": hunyuan_7b(),
    "c4ai-command-r7b": command_r7b(),
    "GLM-4.5-Air": glm_4_5_air(),
    "MiniMax-M2 (without its quantisation)": minimax_m2(),
    "Qwen3-Next-80B-A3B": qwen3_next_80b(),
    "Ministral-3-3B": ministral_3_3b(),
    "Phi-3.5-MoE-instruct": phi_3_5_moe(),
}
# Names that checkpoints have; those of Qwen3-MoE are in test_published_models.py.
NAMED = {
    "Olmo-3-7B": ("model.layers.31.post_feedforward_layernorm.weight", "model.layers.0.self_attn.q_norm.weight"),
    "granite-3.3-8b": ("model.layers.39.post_attention_layernorm.weight",),
    "SmolLM3-3B": ("model.layers.35.self_attn.o_proj.weight",),
    "Seed-OSS-36B": ("model.layers.63.self_attn.v_proj.bias", "lm_head.weight"),
    "ERNIE-4.5-0.3B": ("model.layers.17.mlp.up_proj.weight",),
    "Hy-MT2-7B": ("model.layers.31.self_attn.query_layernorm.weight", "model.layers.0.self_attn.key_layernorm.weight"),
    "c4ai-command-r7b": ("model.layers.31.input_layernorm.weight",),
    "GLM-4.5-Air": (
        "model.layers.45.mlp.gate.e_score_correction_bias",
        "model.layers.1.mlp.shared_experts.up_proj.weight",
    ),
    "Ministral-3-3B": ("language_model.model.layers.25.self_attn.q_proj.weight",),
    "Phi-3.5-MoE-instruct": (
        "model.layers.31.block_sparse_moe.experts.15.w2.weight",
        "model.layers.0.block_sparse_moe.gate.weight",
        "model.layers.0.input_layernorm.bias",
        "model.layers.0.self_attn.o_proj.bias",
        "lm_head.bias",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_published_model_is_read_to_the_last_number(name):
    assert read_model(archs.choose(None, PUBLISHED[name]), PUBLISHED[name]) == MODELS[name]


@pytest.mark.parametrize("name", NAMED)
def test_a_checkpoint_of_the_published_shapes_is_taken_tensor_by_tensor(name, tmp_path: Path):
    named = archs.choose(None, PUBLISHED[name])
    random_checkpoint.write(named, tmp_path / "ck", config=PUBLISHED[name], hollow=True, part="text")
    checkpoint = open_checkpoint(tmp_path / "ck")
    assert set(NAMED[name]) <= checkpoint.tensors.keys()
    assert open_model(Request(named, checkpoint, part="text"))[1] == MODELS[name]


def test_an_alpha_stretches_the_base_of_rope_once_and_for_all():
    named = archs.load("hunyuan_v1_dense")
    plain = {"rope_type": "default", "rope_theta": 10000.0 * 50.0 ** (32 / 30)}
    assert read_model(named, named.tiny) == read_model(named, named.tiny | {"rope_parameters": plain})
    assert "RoPE's alpha" in refusal("hunyuan_v1_dense", rope_parameters={"rope_type": "dynamic", "factor": 2.0})


def test_layers_without_rope_are_the_ones_that_slide():
    sliding = read("smollm3", use_sliding_window=True, sliding_window=8)
    assert windows(sliding) == [None, 8, None]
    assert [layer.mixer.rotated for layer in placed_layers(sliding)] == [None, 0, None]
    assert rotary(sliding).theta == 10000.0


def test_another_theta_of_olmo_3_is_refused_as_layers_would_differ():
    assert "rope_theta is 10000.0, only 500000.0" in refusal("olmo3", rope_theta=10000.0)
