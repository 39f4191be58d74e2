"""Blocks of every kind, as test_trace.py traces them: each with what its spec may say."""

from __future__ import annotations

import dataclasses

import pytest
from vision_blocks import VISION_TRACES

from llmexport.export.spec import (
    Alibi,
    Attention,
    BidirectionalMask,
    CausalConv,
    ChannelMix,
    CrossAttention,
    CrossKeys,
    CrossMask,
    DeltaTimeMix,
    DisentangledAttention,
    DynamicScaling,
    Embedding,
    Experts,
    FilteredAttention,
    GatedDeltaNet,
    GatedNorm,
    Head,
    Keys,
    KimiDeltaAttention,
    LatentAttention,
    Layer,
    LinearScaling,
    Llama3Scaling,
    LocalizedFilter,
    LongScaling,
    Mask,
    Mlp,
    MlpWithExperts,
    Moe,
    Mxfp4,
    Norm,
    Passage,
    PerLayerEmbedding,
    PerLayerInput,
    Presence,
    ProportionalScaling,
    RelativeBias,
    RelativePositions,
    Rotary,
    Router,
    SharedExpert,
    ShiftedMlp,
    Slots,
    Span,
    Sublayer,
    Temperature,
    TimeMix,
    YarnScaling,
    decoder_layer,
)

pytestmark = pytest.mark.model

LLAMA_NORM = Norm(33, 1e-5)
GEMMA_NORM = Norm(33, 1e-6, 1.0, "after_weight")
LAYER_NORM = Norm(33, 1e-5, statistics="layer", bias=True)
HEAD_NORM = Norm(10, 1e-6)
UNIT_NORM = Norm(10, 1e-6, weighted=False)
ROWS_NORM = Norm(10, 1e-5, statistics="layer", rows=6)
SILU_MLP = Mlp(33, 65, "silu")
LAYER = decoder_layer(GEMMA_NORM, Attention(33, 6, 2, 10), GEMMA_NORM, Mlp(33, 65, "gelu_tanh"))
SANDWICH = decoder_layer(
    LLAMA_NORM, Attention(33, 6, 2, 10), LLAMA_NORM, SILU_MLP, mixer_output_norm=LLAMA_NORM, mlp_output_norm=LLAMA_NORM
)
UNCACHED = Attention(33, 3, 3, 10, qkv_bias=True, out_bias=True, rotated=0, cached=False)
MLP = Mlp(33, 65, "gelu_erf", bias=True, gated=False)
POST_NORM = Layer((Sublayer("self_attn", UNCACHED, sum_norm=LAYER_NORM), Sublayer("mlp", MLP, sum_norm=LAYER_NORM)))
SINKS = Attention(33, 6, 2, 10, qkv_bias=True, out_bias=True, sinks=True, window=7)
ALL, LAST = Keys(150), Keys(7, slides=True)
SOFTCAP = Attention(33, 6, 2, 10, softcap=2.0, scale=0.2)
LATENT = LatentAttention(33, 6, key_size=10, rope_size=4, value_size=7, latent=13, query=9, scale=0.3, parted=True)
KIMI_DELTA = KimiDeltaAttention(33, heads=3, size=10, kernel=4, epsilon=1e-5)
DELTA_NET = GatedDeltaNet(33, key_heads=2, key_size=10, value_heads=6, value_size=7, kernel=4, epsilon=1e-6)
ROUTER = Router(33, 9, 3, "softmax", renormalise=True)
EXPERTS = Experts(33, 21, 9, 3)
MOE = Moe(ROUTER, EXPERTS, SharedExpert(SILU_MLP, gated=True))
CLAMPED = Experts(
    64, 32, 5, 2, "swiglu_clamped", 1.702, 7.0, transposed=True, interleaved=True, bias=True, scale_input=False
)
MXFP4 = Experts(64, 32, 5, 2, "swiglu_clamped", 1.702, 7.0, interleaved=True, bias=True, storage=Mxfp4())
FILTER = LocalizedFilter(Norm(34, 1e-6))
BIASED = Attention(33, 6, 2, 10, rotated=0, biased=True)
PARALLEL = decoder_layer(LAYER_NORM, BIASED, LAYER_NORM, SILU_MLP, parallel=True)
DEEP_NORM = Layer(
    (
        Sublayer("self_attn", BIASED, sum_norm=LAYER_NORM, kept=1.7),
        Sublayer("mlp", SILU_MLP, LAYER_NORM, scale=0.3, from_normed=True),
    )
)
RWKV_SUBLAYERS = (
    Sublayer("attention", TimeMix(33), LAYER_NORM),
    Sublayer("feed_forward", ChannelMix(33, 65), LAYER_NORM),
)
DELTA_MIX = DeltaTimeMix(33, 11, decay_rank=5, rate_rank=6, value_rank=4, gate_rank=7, epsilon=1e-4)
QKV_NORMS = Attention(33, 6, 2, 10, scale=1.0, qk_norm=HEAD_NORM, v_norm=UNIT_NORM, key_is_value=True)
BORROWING = Attention(33, 6, 2, 10, qk_norm=HEAD_NORM, borrows=True)
NORMED_ROUTER = Router(33, 9, 3, "softmax", True, norm=LLAMA_NORM, input_scale=0.3, expert_scale=True)
TOLD = Layer((Sublayer("per_layer_input", PerLayerInput(33, 12, "gelu_tanh"), output_norm=GEMMA_NORM),), scaled=True)
DELTA_LAYER = decoder_layer(GEMMA_NORM, DELTA_NET, GEMMA_NORM, MOE)
CASES = [
    (Embedding(37, 33), "float32"),
    (Embedding(37, 33, 33**0.5), "float16"),
    (Embedding(37, 33, types=2, positions=200, norm=LAYER_NORM), "float32"),
    (Embedding(37, 33, positions=202, offset=2), "float32"),
    (Embedding(37, 33, positions=202, offset=2, inner=21), "float32"),
    (Embedding(37, 33, types=2, norm=LAYER_NORM, masked=True), "float32"),
    (Alibi(6), "float32"),
    (Alibi(4, 0.3, rounded=True), "float16"),
    (Alibi(6, keys=ALL), "float32"),
    (RelativeBias(6, 12, 30), "float32"),
    (RelativeBias(6, 12, 30), "float16"),
    (RelativeBias(6, 12, 30, both_ways=True), "float32"),
    (CrossKeys(33, 6, 10), "float32"),
    (CrossMask(), "float32"),
    (CrossAttention(33, 6, 10, 0.3), "float32"),
    (CrossAttention(33, 6, 10, 0.3), "float16"),
    (Rotary(10, 10000.0), "float32"),
    (Rotary(10, 10000.0, LinearScaling(4.0)), "float32"),
    (Rotary(10, 500000.0, Llama3Scaling(8.0, 1.0, 4.0, 64)), "float16"),
    (Rotary(10, 150000.0, YarnScaling(32.0, 64, 32.0, 1.0, False, 1.35)), "float32"),
    # Half of the runs end before position 64.
    (Rotary(10, 10000.0, LongScaling((1.0, 1.1, 1.2, 1.3, 1.4), (1.0, 2.0, 4.0, 8.0, 16.0), 64, 1.2)), "float32"),
    (Rotary(10, 10000.0, LongScaling((1.0,) * 5, (2.0,) * 5, 64, 1.2, 1.4)), "float32"),
    (Rotary(10, 10000.0, DynamicScaling(2.5, 64)), "float32"),
    (Rotary(10, 10000.0, sections=(2, 2, 1)), "float32"),
    (Rotary(10, 10000.0, ProportionalScaling(2)), "float32"),
    (Mask(), "float32"),
    (Rotary(12, 10000.0, halves=True), "float32"),
    (Passage(5, (3, 4)), "float32"),
    (Passage(5, (3,), static=True), "float32"),
    (Mask(prefixed=True), "float32"),
    (Mask(keys=ALL, prefixed=True), "float32"),
    (Attention(33, 6, 6, 12, fused=True, grouped=True, qkv_bias=True, halves=True), "float32"),
    (Mask(7), "float32"),
    (Mask(chunk=7), "float32"),
    (Mask(pictures=True), "float32"),
    (Mask(7, pictures=True), "float32"),
    (BidirectionalMask(), "float32"),
    (Span(), "float32"),
    (Temperature(8, 0.1), "float32"),
    (Presence(), "float32"),
    (Slots(150), "float32"),
    (Mask(7, keys=ALL), "float32"),
    (Mask(7, keys=LAST), "float32"),
    (Mask(7, keys=LAST, pictures=True), "float32"),
    (Mask(keys=ALL, pictures=True), "float32"),
    (Mask(chunk=7, keys=LAST), "float32"),
    (Span(ALL), "float32"),
    (Span(LAST), "float32"),
    (Temperature(8, 0.1, static=True), "float32"),
    (Temperature(8, 0.1, placed=True), "float32"),
    (Presence(static=True), "float16"),
    (Attention(33, 6, 2, 10, keys=ALL), "float32"),
    (Attention(33, 6, 2, 10, keys=ALL), "float16"),
    (Attention(33, 6, 2, 10, keys=LAST), "float32"),
    (Attention(33, 6, 2, 10, sinks=True, keys=ALL), "float32"),
    (Presence(), "float16"),
    (LLAMA_NORM, "float32"),
    (LLAMA_NORM, "float16"),
    (Norm(33, 1e-6, 1.0), "float16"),
    (GEMMA_NORM, "float32"),
    (GEMMA_NORM, "float16"),
    (Norm(33, 1e-5, weighted=False), "float16"),
    (Norm(33, 1e-5, statistics="layer"), "float16"),
    (Norm(33, 1e-5, statistics="layer", weighted=False), "float32"),
    (LAYER_NORM, "float16"),
    (ROWS_NORM, "float32"),
    (ROWS_NORM, "float16"),
    (Attention(33, 3, 1, 10), "float32"),
    (Attention(33, 6, 2, 10, qkv_bias=True, out_bias=True), "float32"),
    (Attention(33, 6, 2, 10, fused=True, rotated=6, interleaved=True, clip=0.5), "float32"),
    (Attention(33, 6, 2, 10, qk_norm=HEAD_NORM, output_gate=True), "float32"),
    (Attention(33, 6, 2, 10, qk_norm=UNIT_NORM, qk_norm_place="after_rotary", interleaved=True), "float32"),
    (Attention(33, 6, 2, 10, qk_norm=HEAD_NORM, qk_norm_over="all_heads"), "float32"),
    (Attention(33, 6, 2, 10, qk_norm=Norm(10, 1e-5, statistics="layer"), qk_norm_over="each_head"), "float32"),
    (Attention(33, 6, 2, 10, rotated=0, temperature=True), "float32"),
    (Attention(33, 6, 2, 10, fused=True, grouped=True, qkv_bias=True), "float32"),
    (Attention(33, 6, 6, 10, fused=True, rotated=0, transposed=True, qkv_bias=True, out_bias=True), "float32"),
    (BIASED, "float32"),
    (BIASED, "float16"),
    (dataclasses.replace(BIASED, keys=ALL), "float32"),
    (RelativePositions(16, 33), "float32"),
    (RelativePositions(16, 33, 40, LAYER_NORM), "float32"),
    (DisentangledAttention(33, 6, 10, 16, 0.2), "float32"),
    (DisentangledAttention(33, 6, 10, 16, 0.2, shared=True), "float16"),
    (DisentangledAttention(33, 6, 10, 16, 0.2, from_position=False, fused=True), "float32"),
    (DisentangledAttention(33, 6, 10, 16, 0.2, to_position=False, fused=True), "float32"),
    (DisentangledAttention(33, 6, 10, 16, 0.2, to_position=False, from_position=False), "float32"),
    (UNCACHED, "float32"),
    (UNCACHED, "float16"),
    (SINKS, "float32"),
    (SINKS, "float16"),
    (SOFTCAP, "float32"),
    (KIMI_DELTA, "float32"),
    (KIMI_DELTA, "float16"),
    (GatedNorm(6, 7, 1e-6, "sigmoid", "after_weight"), "float16"),
    (LATENT, "float32"),
    (LATENT, "float16"),
    (dataclasses.replace(LATENT, query=None, bias=True, parted=False, interleaved=True), "float32"),
    (dataclasses.replace(LATENT, turned=False), "float32"),
    (dataclasses.replace(LATENT, keys=ALL), "float32"),
    (FILTER, "float32"),
    (FILTER, "float16"),
    (FilteredAttention(34, 4, 4, 10, filter=FILTER), "float32"),
    (FilteredAttention(34, 4, 4, 10, filter=FILTER, keys=ALL), "float32"),
    (CausalConv(33, 4), "float32"),
    (CausalConv(33, 2), "float16"),
    (GatedNorm(6, 7, 1e-6), "float32"),
    (GatedNorm(6, 7, 1e-6), "float16"),
    (DELTA_NET, "float32"),
    (DELTA_NET, "float16"),
    (dataclasses.replace(DELTA_NET, grouped=True), "float32"),
    (TimeMix(33), "float32"),
    (TimeMix(33, 0.25), "float16"),
    (ChannelMix(33, 65, 0.5), "float32"),
    (DELTA_MIX, "float32"),
    (DELTA_MIX, "float16"),
    (dataclasses.replace(DELTA_MIX, first=True), "float32"),
    (ShiftedMlp(33, 65), "float32"),
    (SILU_MLP, "float32"),
    (Mlp(33, 65, "gelu_tanh", bias=True), "float32"),
    (Mlp(33, 65, "gelu_erf"), "float16"),
    (Mlp(33, 65, "silu", fused=True), "float32"),
    (Mlp(33, 65, "relu", gated=False), "float32"),
    (Mlp(33, 65, "relu2", gated=False, bias=True, transposed=True), "float32"),
    (ROUTER, "float32"),
    (Router(33, 9, 3, "softmax_top_k", bias=True), "float32"),
    (Router(33, 9, 1, "sigmoid"), "float32"),
    (Router(33, 9, 2, "sparse_mixer", jitter=0.2), "float32"),
    (Router(33, 9, 2, "sparse_mixer", jitter=0.2), "float16"),
    (Router(33, 12, 3, "sigmoid", True, correction=True, groups=4, groups_kept=2, scale=2.5), "float32"),
    (Router(33, 12, 3, "sigmoid", correction=True, groups=4, groups_kept=2, group_best=1, wide=True), "float16"),
    (EXPERTS, "float32"),
    (EXPERTS, "float16"),
    (Experts(33, 21, 9, 1, transposed=True, scale_input=True), "float32"),
    (CLAMPED, "float32"),
    (MXFP4, "float32"),
    (MXFP4, "float16"),
    (SharedExpert(SILU_MLP), "float32"),
    (SharedExpert(SILU_MLP, gated=True), "float32"),
    (Moe(ROUTER, EXPERTS), "float32"),
    (MOE, "float32"),
    (LAYER, "float32"),
    (LAYER, "float16"),
    (SANDWICH, "float32"),
    (POST_NORM, "float32"),
    (PARALLEL, "float32"),
    (DEEP_NORM, "float32"),
    (DELTA_LAYER, "float32"),
    (Layer(RWKV_SUBLAYERS), "float16"),
    (QKV_NORMS, "float32"),
    (QKV_NORMS, "float16"),
    (BORROWING, "float32"),
    (dataclasses.replace(BORROWING, keys=ALL), "float32"),
    (dataclasses.replace(BORROWING, keys=LAST), "float32"),
    (Attention(33, 6, 2, 10, lends=True, keys=LAST), "float32"),
    (NORMED_ROUTER, "float32"),
    (MlpWithExperts(GEMMA_NORM, SILU_MLP, NORMED_ROUTER, EXPERTS), "float32"),
    (PerLayerEmbedding(37, 33, 3, Norm(12, 1e-6)), "float32"),
    (PerLayerEmbedding(37, 33, 3, Norm(12, 1e-6)), "float16"),
    (PerLayerInput(33, 12, "gelu_tanh"), "float32"),
    (TOLD, "float32"),
    (Head(LLAMA_NORM, 37), "float32"),
    (Head(LLAMA_NORM, 37, softcap=3.0), "float32"),
    (Head(LAYER_NORM, 37, transform="gelu_erf", bias=True), "float32"),
    (Head(None, 37, hidden=33), "float32"),
    (Head(LAYER_NORM, 37, inner=21), "float32"),
    *VISION_TRACES,
]

KINDS = [(block.kind, dtype) for block, dtype in CASES]
# Two of each kind in each dtype; the others are slow.
PARAMETERS = [
    pytest.param(case, marks=pytest.mark.slow if KINDS[:place].count(KINDS[place]) > 1 else ())
    for place, case in enumerate(CASES)
]
