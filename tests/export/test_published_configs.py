"""Published configs, read to the last number and as transformers reads them."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import transformers
from arch_cases import IN_TRANSFORMERS
from layouts import WHOLE
from published_configs import LONG_FACTOR, PUBLISHED, SHORT_FACTOR, WITH_MORE_KEYS
from published_latent import LATENT_MODELS
from published_pairs import PAIRED_MODELS
from tiny_configs import config_class, read, read_whole

from llmexport.export import archs
from llmexport.export.onnx_file import read_model
from llmexport.export.spec import (
    Alibi,
    Attention,
    BidirectionalMask,
    ChannelMix,
    DisentangledAttention,
    Embedding,
    Experts,
    GatedDeltaNet,
    Head,
    Layer,
    LinearScaling,
    Llama3Scaling,
    LongScaling,
    Mask,
    Mlp,
    MlpWithExperts,
    Model,
    Moe,
    Mxfp4,
    Norm,
    Presence,
    ProportionalScaling,
    RelativePositions,
    Rotary,
    Router,
    SharedExpert,
    Span,
    Sublayer,
    Temperature,
    TimeMix,
    YarnScaling,
    decoder_layer,
)
from llmexport.export.stack import wired

CLASSES = {n: transformers.CONFIG_MAPPING[archs.load(n).model_types[0]] for n in IN_TRANSFORMERS}
THEIRS = {t for n in IN_TRANSFORMERS for t in archs.load(n).model_types}

# Without these its own model is none.
NO_DEFAULT = {"deepseek_v2": {"num_experts_per_tok": 6}, "glm4_moe": {"head_dim": 128}}


def published(name: str) -> Model:
    config = PUBLISHED[name]
    return read_model(archs.choose(None, config), config)


def as_transformers_writes(config: dict[str, Any]) -> dict[str, Any]:
    """The config as transformers understands it: every key that its class has, in the words of this version."""
    return config_class(config)(**copy.deepcopy(config)).to_dict()


@pytest.mark.parametrize("arch", CLASSES)
def test_every_key_that_transformers_writes_is_understood(arch):
    read_model(archs.load(arch), CLASSES[arch](**NO_DEFAULT.get(arch, {})).to_dict())


@pytest.mark.parametrize("kind", WHOLE)
def test_every_key_that_transformers_writes_beside_the_text_model_is_understood(kind):
    config, named = transformers.CONFIG_MAPPING[kind]().to_dict(), archs.load(WHOLE[kind])
    assert read_model(named, config) == read_model(named, config["text_config"])


@pytest.mark.parametrize("arch", CLASSES)
def test_the_tiny_config_means_to_transformers_what_it_means_here(arch):
    tiny = copy.deepcopy(dict(archs.load(arch).tiny))
    written = CLASSES[arch](**tiny).to_dict()
    assert tiny.keys() <= written.keys()
    assert read_model(archs.load(arch), written) == read(arch)


@pytest.mark.parametrize("kind", WHOLE)
def test_a_text_model_is_the_same_alone_and_in_a_multimodal_config(kind):
    assert read_whole(kind) == read(WHOLE[kind])


@pytest.mark.parametrize("name", [n for n, c in (PUBLISHED | WITH_MORE_KEYS).items() if c["model_type"] in THEIRS])
def test_a_published_config_reads_as_what_transformers_makes_of_it(name):
    config = (PUBLISHED | WITH_MORE_KEYS)[name]
    named = archs.choose(None, config)
    assert read_model(named, config) == read_model(named, as_transformers_writes(config))


def test_every_architecture_has_a_published_config():
    assert {archs.choose(None, config).name for config in PUBLISHED.values()} == set(archs.names())


def gemma_2b() -> Model:
    norm = Norm(2048, 1e-6, 1.0, "after_weight")
    block = decoder_layer(norm, Attention(2048, 8, 1, 256), norm, Mlp(2048, 16384, "gelu_tanh"))
    layer = (block, (Rotary(256, 10000.0), Mask()))
    return wired(Embedding(256000, 2048, 2048**0.5), (layer,) * 18, Head(norm, 256000), tied=True)


def llama(layers: int, hidden: int, block: Layer, rotary: Rotary, vocabulary: int, tied: bool = False) -> Model:
    """Alike layers that see everything."""
    reads, norm = (rotary, Mask()), block.sublayers[0].input_norm
    assert norm
    return wired(Embedding(vocabulary, hidden), ((block, reads),) * layers, Head(norm, vocabulary), tied=tied)


def llama_3_1_8b() -> Model:
    norm = Norm(4096, 1e-5)
    block = decoder_layer(norm, Attention(4096, 32, 8, 128), norm, Mlp(4096, 14336, "silu"))
    return llama(32, 4096, block, Rotary(128, 500000.0, Llama3Scaling(8.0, 1.0, 4.0, 8192)), 128256)


def skywork_13b() -> Model:
    norm = Norm(4608, 1e-6)
    block = decoder_layer(norm, Attention(4608, 36, 36, 128), norm, Mlp(4608, 12288, "silu"))
    return llama(52, 4608, block, Rotary(128, 10000.0), 65536)


def linear_scaling() -> Model:
    norm = Norm(64, 1e-5)
    block = decoder_layer(norm, Attention(64, 4, 4, 16), norm, Mlp(64, 128, "silu"))
    return llama(2, 64, block, Rotary(16, 20000.0, LinearScaling(4.0)), 256)


def glm_4(epsilon: float, *, sandwich: bool) -> Model:
    norm = Norm(4096, epsilon)
    attention = Attention(4096, 32, 2, 128, qkv_bias=True, rotated=64, interleaved=True)
    output = norm if sandwich else None
    block = decoder_layer(norm, attention, norm, Mlp(4096, 13696, "silu", fused=True), output, output)
    return llama(40, 4096, block, Rotary(64, 10000.0), 151552)


def gpt_oss_20b() -> Model:
    norm = Norm(2880, 1e-5, rounding="after_weight")
    moe = Moe(
        Router(2880, 32, 4, "softmax_top_k", bias=True),
        Experts(2880, 2880, 32, 4, "swiglu_clamped", 1.702, 7.0, interleaved=True, bias=True, storage=Mxfp4()),
    )
    yarn = YarnScaling(32.0, 4096, 32.0, 1.0, truncate=False, magnitude=0.1 * math.log(32.0) + 1.0)
    reads = (Rotary(64, 150000.0, yarn), Span())
    layers = []
    for window in (128, 0) * 12:
        attention = Attention(2880, 64, 8, 64, qkv_bias=True, out_bias=True, sinks=True, window=window)
        layers.append((decoder_layer(norm, attention, norm, moe), reads))
    return wired(Embedding(201088, 2880), tuple(layers), Head(norm, 201088), tied=False)


def llama_4_scout() -> Model:
    norm = Norm(5120, 1e-5)
    moe = Moe(
        Router(5120, 16, 1, "sigmoid"),
        Experts(5120, 8192, 16, 1, "silu", transposed=True, scale_input=True),
        SharedExpert(Mlp(5120, 8192, "silu")),
    )
    unit = Norm(128, 1e-5, weighted=False)
    turns = Attention(5120, 40, 8, 128, interleaved=True, qk_norm=unit, qk_norm_place="after_rotary")
    straight = Attention(5120, 40, 8, 128, rotated=0, temperature=True)
    rotary = Rotary(128, 500000.0, Llama3Scaling(16.0, 1.0, 1.0, 8192))
    chunked = (decoder_layer(norm, turns, norm, moe), (rotary, Mask(chunk=8192)))
    full = (decoder_layer(norm, straight, norm, moe), (Temperature(8192, 0.1), Mask()))
    return wired(Embedding(202048, 5120), (chunked, chunked, chunked, full) * 12, Head(norm, 202048), tied=False)


def qwen3_5_35b() -> Model:
    norm = Norm(2048, 1e-6, 1.0, "after_weight")
    moe = Moe(
        Router(2048, 256, 8, "softmax", renormalise=True),
        Experts(2048, 512, 256, 8, "silu"),
        SharedExpert(Mlp(2048, 512, "silu"), gated=True),
    )
    net = GatedDeltaNet(2048, key_heads=16, key_size=128, value_heads=32, value_size=128, kernel=4, epsilon=1e-6)
    heads = Norm(256, 1e-6, 1.0, "after_weight")
    attention = Attention(2048, 16, 2, 256, rotated=64, qk_norm=heads, output_gate=True)
    linear = (decoder_layer(norm, net, norm, moe), (Presence(),))
    full = (decoder_layer(norm, attention, norm, moe), (Rotary(64, 10000000.0, sections=(11, 11, 10)), Mask()))
    return wired(Embedding(248320, 2048), (linear, linear, linear, full) * 10, Head(norm, 248320), tied=False)


def qwen3_5_27b() -> Model:
    norm, mlp = Norm(5120, 1e-6, 1.0, "after_weight"), Mlp(5120, 17408, "silu")
    net = GatedDeltaNet(5120, key_heads=16, key_size=128, value_heads=48, value_size=128, kernel=4, epsilon=1e-6)
    heads = Norm(256, 1e-6, 1.0, "after_weight")
    attention = Attention(5120, 24, 4, 256, rotated=64, qk_norm=heads, output_gate=True)
    linear = (decoder_layer(norm, net, norm, mlp), (Presence(),))
    full = (decoder_layer(norm, attention, norm, mlp), (Rotary(64, 10000000.0, sections=(11, 11, 10)), Mask()))
    return wired(Embedding(248320, 5120), (linear, linear, linear, full) * 16, Head(norm, 248320), tied=False)


def gemma_2_2b() -> Model:
    norm = Norm(2304, 1e-6, 1.0, "after_weight")
    layers = []
    for window in (4096, 0) * 13:
        attention = Attention(2304, 8, 4, 256, scale=256**-0.5, softcap=50.0, window=window)
        block = decoder_layer(norm, attention, norm, Mlp(2304, 9216, "gelu_tanh"), norm, norm)
        layers.append((block, (Rotary(256, 10000.0), Span())))
    return wired(Embedding(256000, 2304, 2304**0.5), tuple(layers), Head(norm, 256000, 30.0), tied=True)


def gemma_3_1b() -> Model:
    norm = Norm(1152, 1e-6, 1.0, "after_weight")
    attention = Attention(1152, 4, 1, 256, scale=256**-0.5, qk_norm=Norm(256, 1e-6, 1.0, "after_weight"))
    block = decoder_layer(norm, attention, norm, Mlp(1152, 6912, "gelu_tanh"), norm, norm)
    slides = (block, (Rotary(256, 10000.0), Mask(512)))
    full = (block, (Rotary(256, 1000000.0), Mask()))
    layers = (*(*[slides] * 5, full) * 4, slides, slides)
    return wired(Embedding(262144, 1152, 1152**0.5), layers, Head(norm, 262144), tied=True)


def qwen3_8b() -> Model:
    norm = Norm(4096, 1e-6)
    attention = Attention(4096, 32, 8, 128, qk_norm=Norm(128, 1e-6))
    return llama(
        36, 4096, decoder_layer(norm, attention, norm, Mlp(4096, 12288, "silu")), Rotary(128, 1000000.0), 151936
    )


def phi_3_mini(window: int, scaling: LongScaling | None) -> Model:
    norm = Norm(3072, 1e-5)
    attention = Attention(3072, 32, 32, 96, fused=True, rotated=96)
    block = decoder_layer(norm, attention, norm, Mlp(3072, 8192, "silu", fused=True))
    layer = (block, (Rotary(96, 10000.0, scaling), Mask(window)))
    return wired(Embedding(32064, 3072), (layer,) * 32, Head(norm, 32064), tied=False)


def olmo_1b() -> Model:
    norm = Norm(2048, 1e-5, statistics="layer", weighted=False)
    block = decoder_layer(norm, Attention(2048, 16, 16, 128), norm, Mlp(2048, 8192, "silu"))
    return llama(16, 2048, block, Rotary(128, 10000.0), 50304, tied=True)


def olmo_2_7b() -> Model:
    norm = Norm(4096, 1e-6, rounding="after_weight")
    attention = Attention(4096, 32, 32, 128, qk_norm=norm, qk_norm_over="all_heads")
    block = decoder_layer(None, attention, None, Mlp(4096, 11008, "silu"), norm, norm)
    layer = (block, (Rotary(128, 500000.0), Mask()))
    return wired(Embedding(100352, 4096), (layer,) * 32, Head(norm, 100352), tied=False)


def aya_23_8b() -> Model:
    norm = Norm(4096, 1e-5, statistics="layer")
    attention = Attention(4096, 32, 8, 128, interleaved=True)
    block = decoder_layer(norm, attention, None, Mlp(4096, 14336, "silu"), parallel=True)
    layer = (block, (Rotary(128, 10000.0), Mask()))
    return wired(Embedding(256000, 4096), (layer,) * 32, Head(norm, 256000, scale=0.0625), tied=True)


def bert_base() -> Model:
    norm = Norm(768, 1e-12, statistics="layer", bias=True)
    attention = Attention(768, 12, 12, 64, qkv_bias=True, out_bias=True, rotated=0, cached=False)
    mlp = Mlp(768, 3072, "gelu_erf", bias=True, gated=False)
    layer = Layer((Sublayer("self_attn", attention, sum_norm=norm), Sublayer("mlp", mlp, sum_norm=norm)))
    embedding = Embedding(30522, 768, types=2, positions=512, norm=norm)
    return wired(
        embedding,
        ((layer, (BidirectionalMask(),)),) * 12,
        Head(norm, 30522, transform="gelu_erf", bias=True),
        tied=True,
    )


def gpt2(hidden: int, heads: int, layers: int) -> Model:
    norm = Norm(hidden, 1e-5, statistics="layer", bias=True)
    fields = {"qkv_bias": True, "out_bias": True, "fused": True, "transposed": True, "rotated": 0}
    attention = Attention(hidden, heads, heads, 64, scale=64**-0.5, **fields)
    mlp = Mlp(hidden, 4 * hidden, "gelu_tanh", bias=True, gated=False, transposed=True)
    layer = (decoder_layer(norm, attention, norm, mlp), (Mask(),))
    embedding = Embedding(50257, hidden, positions=1024, offset=0)
    return wired(embedding, (layer,) * layers, Head(norm, 50257), tied=True)


def openai_gpt() -> Model:
    norm = Norm(768, 1e-5, statistics="layer", bias=True)
    fields = {"qkv_bias": True, "out_bias": True, "fused": True, "transposed": True, "rotated": 0}
    mlp = Mlp(768, 3072, "gelu_tanh", bias=True, gated=False, transposed=True)
    attention = Attention(768, 12, 12, 64, **fields)
    layer = Layer((Sublayer("self_attn", attention, sum_norm=norm), Sublayer("mlp", mlp, sum_norm=norm)))
    embedding = Embedding(40478, 768, positions=512, offset=0)
    return wired(embedding, ((layer, (Mask(),)),) * 12, Head(None, 40478, hidden=768), tied=True)


def gpt_neo_125m() -> Model:
    norm = Norm(768, 1e-5, statistics="layer", bias=True)
    mlp = Mlp(768, 3072, "gelu_tanh", bias=True, gated=False)
    block = decoder_layer(norm, Attention(768, 12, 12, 64, out_bias=True, rotated=0, scale=1.0), norm, mlp)
    layers = ((block, (Mask(),)), (block, (Mask(256),))) * 6
    return wired(Embedding(50257, 768, positions=2048, offset=0), layers, Head(norm, 50257), tied=True)


def opt_350m() -> Model:
    norm = Norm(1024, 1e-5, statistics="layer", bias=True)
    attention = Attention(1024, 16, 16, 64, qkv_bias=True, out_bias=True, rotated=0)
    mlp = Mlp(1024, 4096, "relu", bias=True, gated=False)
    layer = Layer((Sublayer("self_attn", attention, sum_norm=norm), Sublayer("mlp", mlp, sum_norm=norm)))
    embedding = Embedding(50272, 1024, positions=2050, offset=2, inner=512)
    return wired(embedding, ((layer, (Mask(),)),) * 24, Head(None, 50272, hidden=1024, inner=512), tied=True)


def starcoder2_3b() -> Model:
    norm = Norm(3072, 1e-5, statistics="layer", bias=True)
    attention = Attention(3072, 24, 2, 128, qkv_bias=True, out_bias=True)
    block = decoder_layer(norm, attention, norm, Mlp(3072, 12288, "gelu_tanh", bias=True, gated=False))
    layer = (block, (Rotary(128, 999999.4420358813), Mask(4096)))
    return wired(Embedding(49152, 3072), (layer,) * 30, Head(norm, 49152), tied=True)


def deberta(vocabulary: int, attention: DisentangledAttention, relative: RelativePositions) -> Model:
    norm = Norm(768, 1e-7, statistics="layer", bias=True)
    mlp = Mlp(768, 3072, "gelu_erf", bias=True, gated=False)
    layer = Layer((Sublayer("self_attn", attention, sum_norm=norm), Sublayer("mlp", mlp, sum_norm=norm)))
    head = Head(norm, vocabulary, transform="gelu_erf", bias=True)
    return wired(Embedding(vocabulary, 768, norm=norm, masked=True), ((layer, (relative,)),) * 12, head, tied=True)


def deberta_base() -> Model:
    attention = DisentangledAttention(768, 12, 64, 512, (3 * 64) ** -0.5, fused=True)
    return deberta(50265, attention, RelativePositions(512, 768))


def deberta_v3_base() -> Model:
    attention = DisentangledAttention(768, 12, 64, 256, (3 * 64) ** -0.5, shared=True)
    normed = RelativePositions(256, 768, 512, Norm(768, 1e-7, statistics="layer", bias=True))
    return deberta(128100, attention, normed)


def gemma_4_26b() -> Model:
    norm, router = Norm(2816, 1e-6, rounding="after_weight"), Router(2816, 128, 8, "softmax", renormalise=True)
    router = dataclasses.replace(router, norm=Norm(2816, 1e-6), input_scale=2816**-0.5, expert_scale=True)
    experts = Experts(2816, 704, 128, 8, "gelu_tanh")
    beside = Sublayer("mlp", MlpWithExperts(norm, Mlp(2816, 2112, "gelu_tanh"), router, experts), output_norm=norm)

    def layer(kv_heads: int, size: int, key_is_value: bool) -> Layer:
        heads = Attention(2816, 16, kv_heads, size, scale=1.0, key_is_value=key_is_value)
        qk, v = Norm(size, 1e-6, rounding="after_weight"), Norm(size, 1e-6, weighted=False)
        heads = dataclasses.replace(heads, qk_norm=qk, v_norm=v)
        return Layer((Sublayer("self_attn", heads, norm, norm), beside), scaled=True)

    slides = (layer(8, 256, False), (Rotary(256, 10000.0), Mask(1024)))
    full = (layer(2, 512, True), (Rotary(512, 1000000.0, ProportionalScaling(64)), Mask()))
    head = Head(norm, 262144, 30.0)
    return wired(Embedding(262144, 2816, 2816**0.5), (*[slides] * 5, full) * 5, head, tied=True)


def mixtral_8x7b() -> Model:
    norm = Norm(4096, 1e-5)
    moe = Moe(Router(4096, 8, 2, "softmax", renormalise=True), Experts(4096, 14336, 8, 2, "silu"))
    block = decoder_layer(norm, Attention(4096, 32, 8, 128), norm, moe)
    return llama(32, 4096, block, Rotary(128, 1000000.0), 32000)


def qwen1_5_moe() -> Model:
    norm = Norm(2048, 1e-6)
    moe = Moe(
        Router(2048, 60, 4, "softmax"),
        Experts(2048, 1408, 60, 4, "silu"),
        SharedExpert(Mlp(2048, 5632, "silu"), gated=True),
    )
    block = decoder_layer(norm, Attention(2048, 16, 16, 128, qkv_bias=True), norm, moe)
    return llama(24, 2048, block, Rotary(128, 1000000.0), 151936)


def layer_norm(size: int) -> Norm:
    return Norm(size, 1e-5, statistics="layer", bias=True)


def bloom_176b() -> Model:
    norm = layer_norm(14336)
    biases = {"qkv_bias": True, "out_bias": True, "biased": True}
    attention = Attention(14336, 112, 112, 128, fused=True, grouped=True, rotated=0, **biases)
    block = decoder_layer(norm, attention, norm, Mlp(14336, 57344, "gelu_tanh", bias=True, gated=False))
    layers = ((block, (Mask(), Alibi(112))),) * 70
    return wired(Embedding(250880, 14336, norm=norm), layers, Head(norm, 250880), tied=True)


def falcon_40b() -> Model:
    norm, attention = layer_norm(8192), Attention(8192, 128, 8, 64, fused=True, grouped=True)
    mlp = Mlp(8192, 32768, "gelu_erf", gated=False)
    block = Layer((Sublayer("attn", attention, norm), Sublayer("ffn", mlp, norm)), parallel=True)
    layers = ((block, (Rotary(64, 10000.0), Mask())),) * 60
    return wired(Embedding(65024, 8192), layers, Head(norm, 65024), tied=True)


def falcon_11b() -> Model:
    norm, attention = layer_norm(4096), Attention(4096, 32, 8, 128, fused=True, grouped=True)
    block = decoder_layer(norm, attention, None, Mlp(4096, 16384, "gelu_erf", gated=False), parallel=True)
    return llama(60, 4096, block, Rotary(128, 500042.0), 65024)


def falcon_rw_1b() -> Model:
    norm, biases = layer_norm(2048), {"qkv_bias": True, "out_bias": True, "biased": True}
    attention = Attention(2048, 32, 32, 64, fused=True, grouped=True, rotated=0, **biases)
    block = decoder_layer(norm, attention, norm, Mlp(2048, 8192, "gelu_erf", bias=True, gated=False))
    layers = ((block, (Mask(), Alibi(32, 0.125, rounded=True))),) * 24
    return wired(Embedding(50304, 2048), layers, Head(norm, 50304), tied=True)


def pythia_1b() -> Model:
    norm, biases = layer_norm(2048), {"qkv_bias": True, "out_bias": True}
    attention = Attention(2048, 8, 8, 256, fused=True, grouped=True, rotated=64, **biases)
    mlp = Mlp(2048, 8192, "gelu_erf", bias=True, gated=False)
    block = decoder_layer(norm, attention, norm, mlp, parallel=True)
    return llama(16, 2048, block, Rotary(64, 10000.0), 50304)


def phi_2() -> Model:
    norm, biases = layer_norm(2560), {"qkv_bias": True, "out_bias": True}
    mlp = Mlp(2560, 10240, "gelu_tanh", bias=True, gated=False)
    block = decoder_layer(norm, Attention(2560, 32, 32, 80, rotated=32, **biases), None, mlp, parallel=True)
    layers = ((block, (Rotary(32, 10000.0), Mask())),) * 32
    return wired(Embedding(51200, 2560), layers, Head(norm, 51200, bias=True), tied=False)


def stablelm_2_12b() -> Model:
    norm, heads = layer_norm(5120), Norm(160, 1e-5, statistics="layer")
    attention = Attention(5120, 32, 8, 160, rotated=40, qk_norm=heads, qk_norm_over="each_head")
    block = decoder_layer(norm, attention, None, Mlp(5120, 13824, "silu"), parallel=True)
    return llama(40, 5120, block, Rotary(40, 10000.0), 100352)


def rwkv_169m() -> Model:
    norm = Norm(768, 1e-5, statistics="layer", bias=True)

    def layer(scale: float, halved: float) -> Layer:
        time, channel = TimeMix(768, scale), ChannelMix(768, 3072, scale)
        second = Sublayer("feed_forward", channel, norm, scale=halved, kept=halved)
        return Layer((Sublayer("attention", time, norm), second))

    scales = (*((1.0, 1.0),) * 5, (1.0, 0.5), *((0.5, 1.0),) * 5, (0.5, 0.5))
    layers = [(layer(*s), (Presence(),)) for s in scales]
    return wired(Embedding(50277, 768, norm=norm), layers, Head(norm, 50277), tied=False)


# 131072 positions are 32 times the original 4096.
LONG = LongScaling(tuple(SHORT_FACTOR), tuple(LONG_FACTOR), 4096, math.sqrt(1 + math.log(32.0) / math.log(4096)))
MODELS = {
    "gemma-2b": gemma_2b(),
    "OLMo-2-1124-7B": olmo_2_7b(),
    "aya-23-8B": aya_23_8b(),
    "bert-base-uncased": bert_base(),
    "rwkv-4-169m-pile": rwkv_169m(),
    "gpt2-xl": gpt2(1600, 25, 48),
    "distilgpt2": gpt2(768, 12, 6),
    "openai-gpt": openai_gpt(),
    "gpt-neo-125m": gpt_neo_125m(),
    "opt-350m": opt_350m(),
    "starcoder2-3b": starcoder2_3b(),
    "deberta-base": deberta_base(),
    "deberta-v3-base": deberta_v3_base(),
    "Llama-3.1-8B": llama_3_1_8b(),
    "Skywork-13B": skywork_13b(),
    "linear scaling": linear_scaling(),
    "GLM-4-9B-0414": glm_4(1e-5, sandwich=True),
    "glm-4-9b-chat-hf": glm_4(1.5625e-7, sandwich=False),
    "gpt-oss-20b": gpt_oss_20b(),
    "Llama-4-Scout-17B-16E": llama_4_scout(),
    "Qwen3.5-35B-A3B": qwen3_5_35b(),
    "Qwen3.5-27B": qwen3_5_27b(),
    "gemma-2-2b": gemma_2_2b(),
    "gemma-3-1b-pt": gemma_3_1b(),
    "gemma-4-26B-A4B": gemma_4_26b(),
    "Qwen3-8B": qwen3_8b(),
    "Phi-3-mini-4k-instruct": phi_3_mini(2047, None),
    "Phi-3-mini-128k-instruct": phi_3_mini(262144, LONG),
    "OLMo-1B-hf": olmo_1b(),
    "Mixtral-8x7B-v0.1": mixtral_8x7b(),
    "Qwen1.5-MoE-A2.7B": qwen1_5_moe(),
    "bloom": bloom_176b(),
    "falcon-40b": falcon_40b(),
    "falcon-11B": falcon_11b(),
    "falcon-rw-1b": falcon_rw_1b(),
    "pythia-1b": pythia_1b(),
    "phi-2": phi_2(),
    "stablelm-2-12b": stablelm_2_12b(),
    **LATENT_MODELS,
    **PAIRED_MODELS,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_published_model_is_read_to_the_last_number(name):
    assert published(name) == MODELS[name]
