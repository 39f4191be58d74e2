"""Traces: a block's graph holds no weights, is right at every size, and says what its ports say."""

import dataclasses

import onnx
import onnxruntime
import pytest
import torch
from vision_blocks import VISION_TRACES

from llmexport.export import blocks
from llmexport.export.graph_file import load_block, load_body
from llmexport.export.spec import (
    BATCH,
    FEATURES,
    IMAGES,
    PAST,
    SEQUENCE,
    SOURCE,
    SPLICED,
    TILES,
    TOTAL,
    WRITTEN,
    Alibi,
    Attention,
    BidirectionalMask,
    Block,
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
    Mixer,
    Mlp,
    MlpWithExperts,
    Moe,
    Mxfp4,
    Norm,
    Passage,
    PerLayerEmbedding,
    PerLayerInput,
    Port,
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
from llmexport.export.trace import SIZES, torch_dtype, trace_block, trace_body
from llmexport.graphs.bodies import attach_bodies
from llmexport.plugins.spec import DOMAIN, VERSION
from llmexport.validate.compare import compare
from llmexport.validate.feeds import block_feed
from llmexport.validate.runners import to_torch
from llmexport.validate.tolerance import Tolerance

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
# batch, sequence, past: a decode step, a first token, prefills longer than what was traced, and a chunk.
RUNS = [(1, 1, 6), (1, 1, 0), (3, 63, 0), (1, 130, 0), (2, 5, 130)]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0].kind}-{case[1]}")
def case(request: pytest.FixtureRequest) -> tuple[Block, str, onnx.ModelProto]:
    block, dtype = request.param
    return block, dtype, load_block(block, dtype)


def filled(block: Block, dtype: str) -> torch.nn.Module:
    """The block's module with seeded weights that keep its values of order one."""
    module = blocks.module(block, torch_dtype(dtype))
    seed = torch.Generator().manual_seed(0)
    for path, parameter in list(module.named_parameters()):
        owner, _, name = path.rpartition(".")
        usual = block.stored[path].usual if path in block.stored else None
        if usual:
            values = usual[0] + (usual[1] - usual[0]) * torch.rand(parameter.shape, generator=seed)
        else:
            values = torch.randn(parameter.shape, generator=seed) * parameter.shape[-1] ** -0.5
        weight = torch.nn.Parameter(values.to(parameter.dtype), requires_grad=False)
        setattr(module.get_submodule(owner), name, weight)
    return module


def sizes(batch: int, sequence: int, past: int) -> dict[str, int]:
    seen = {IMAGES: batch, TILES: batch, FEATURES: batch + sequence, SPLICED: batch * sequence}
    seen[SOURCE] = sequence + 2 * past + 3
    return {BATCH: batch, SEQUENCE: sequence, PAST: past, TOTAL: sequence + past, WRITTEN: sequence + past, **seen}


def feeds(block: Block, dtype: str, run: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    """Every input port filled, by its meaning."""
    return {n: to_torch(a) for n, a in block_feed(block, dtype, sizes(*run), seed=sum(run)).items()}


def with_bodies(model: onnx.ModelProto) -> onnx.ModelProto:
    made = onnx.ModelProto()
    made.CopyFrom(model)
    attach_bodies(made, load_body)
    return made


def test_every_kind_of_block_is_traced_here():
    # All but the base of attention and the gated delta net.
    assert {block.kind for block, _ in CASES} == Block.kinds.keys() - {Mixer.kind}


def test_no_run_is_of_the_size_that_was_traced():
    assert sizes(SIZES[BATCH], SIZES[SEQUENCE], SIZES[PAST]) not in [sizes(*run) for run in RUNS]


def test_onnx_runtime_equals_the_torch_module_at_other_sizes(case):
    block, dtype, model = case
    module = filled(block, dtype)
    parameters = {n: p.numpy() for n, p in module.named_parameters()}
    session = onnxruntime.InferenceSession(with_bodies(model).SerializeToString(), providers=["CPUExecutionProvider"])
    # Sums of up to 65 products in another order, twice in a layer: some roundings of the largest value. A 16-bit
    # graph rounds after every operation, and where a library keeps fp32 for longer, it rounds elsewhere.
    eps = float(torch.finfo(torch_dtype(dtype)).eps)
    bound = Tolerance(16 * eps, 8 * eps, scaled=True)
    for run in RUNS:
        tensors = feeds(block, dtype, run)
        expected = module(*tensors.values())
        expected = expected if isinstance(expected, tuple) else (expected,)
        found = session.run(None, {n: t.numpy() for n, t in tensors.items()} | parameters)
        for port, e, f in zip(block.outputs, expected, found, strict=True):
            difference = compare(e.numpy(), f)
            assert difference.excess(bound) <= 1, f"{port.name} at {run}: {difference}"


@pytest.mark.parametrize("mask", [Mask(7), Mask(chunk=7), Mask(7, keys=ALL), Mask(chunk=7, keys=LAST)], ids=str)
def test_a_mask_has_no_row_without_a_key(mask):
    module = filled(mask, "float32")
    for run in RUNS:
        assert module(*feeds(mask, "float32", run).values()).any(-1).all()


def test_inputs_are_the_ports_and_then_the_parameters(case):
    block, dtype, model = case
    parameters = [n for n, _ in blocks.module(block, torch_dtype(dtype)).named_parameters()]
    assert [i.name for i in model.graph.input] == [p.name for p in block.inputs] + parameters


def dims(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    return tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)


def dtype_of(value: onnx.ValueInfoProto) -> str:
    return onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name


def test_ports_have_the_shapes_and_types_of_the_spec(case):
    block, dtype, model = case

    def said(ports: tuple[Port, ...]) -> list[tuple[str, tuple[int | str, ...], str]]:
        return [(p.name, p.shape, dtype if p.dtype == "T" else p.dtype) for p in ports]

    inputs = list(model.graph.input)[: len(block.inputs)]
    assert [(v.name, dims(v), dtype_of(v)) for v in inputs] == said(block.inputs)
    assert [(v.name, dims(v), dtype_of(v)) for v in model.graph.output] == said(block.outputs)


def test_parameters_have_the_shapes_and_types_of_the_module(case):
    block, dtype, model = case
    parameters = dict(blocks.module(block, torch_dtype(dtype)).named_parameters())
    expected = {n: (tuple(p.shape), str(p.dtype).removeprefix("torch.")) for n, p in parameters.items()}
    found = {v.name: (dims(v), dtype_of(v)) for v in model.graph.input if v.name in expected}
    assert found == expected
    assert {kind for n, (_, kind) in found.items() if block.dtype_of(n) != "F"} <= {dtype, "uint8"}
    assert {kind for n, (_, kind) in found.items() if block.dtype_of(n) == "F"} <= {"float32"}


def test_every_inner_value_is_typed(case):
    model = case[2]
    graph = model.graph
    typed = {v.name for v in (*graph.value_info, *graph.input, *graph.output)} | {t.name for t in graph.initializer}
    assert {n for node in graph.node for n in (*node.input, *node.output) if n} <= typed


def test_the_graph_is_valid(case):
    onnx.checker.check_model(with_bodies(case[2]), full_check=True)


def test_the_graph_imports_one_opset_and_our_domain_at_most(case):
    imports = {o.domain: o.version for o in case[2].opset_import}
    assert (imports.pop(DOMAIN, 1) <= VERSION, imports) == (True, {"": case[0].opset})
    assert case[0].opset == (24 if any(n.op_type == "TensorScatter" for n in case[2].graph.node) else 23)


def test_the_graph_has_no_bodies(case):
    assert len(case[2].functions) == 0


def ops(model: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in model.graph.node]


OURS = ("SinkAttention", "MoeRoute", "MoeExperts", "CausalConv1d", "GatedDeltaRule", "KimiDeltaRule")
OURS += ("GatedRmsNorm", "Wkv", "Wkv7")
FEW = [
    (LAYER, {"Attention": 1, "Rope": 2, "RMSNormalization": 2, "MatMul": 7, "Gelu": 1}),
    (SANDWICH, {"Attention": 1, "Rope": 2, "RMSNormalization": 4, "MatMul": 7, "Sigmoid": 1}),
    (SINKS, {"SinkAttention": 1, "Rope": 2, "MatMul": 4}),
    # The projections, and each head's two matrices, which lie in one.
    (LATENT, {"Attention": 1, "Rope": 2, "RMSNormalization": 2, "MatMul": 6}),
    (DELTA_NET, {"CausalConv1d": 1, "GatedDeltaRule": 1, "GatedRmsNorm": 1, "MatMul": 5, "Softplus": 1, "Sigmoid": 1}),
    (KIMI_DELTA, {"CausalConv1d": 1, "KimiDeltaRule": 1, "GatedRmsNorm": 1, "MatMul": 9, "Softplus": 1, "Sigmoid": 1}),
    (TimeMix(33), {"Wkv": 1, "MatMul": 4, "Sigmoid": 1}),
    (DELTA_MIX, {"Wkv7": 1, "MatMul": 12, "Tanh": 1, "Sigmoid": 3}),
    # The shared expert's three matrices, its gate and the router's scores.
    (MOE, {"MoeRoute": 1, "MoeExperts": 1, "MatMul": 5, "Sigmoid": 2}),
]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("block", "expected"), FEW, ids=lambda value: getattr(value, "kind", ""))
def test_a_block_is_written_in_few_operators(block, expected, dtype):
    found = ops(load_block(block, dtype))
    counted = {*expected, *OURS, "Attention", "Rope", "MatMul", "Loop", "Scan", "If"}
    assert {o: found.count(o) for o in counted if o in found} == expected


@pytest.fixture(scope="module")
def huge() -> onnx.ModelProto:
    """The MLP of gemma-2b: 400 MB of weights."""
    return trace_block(Mlp(2048, 16384, "gelu_tanh"), "float32")


def test_a_trace_holds_no_weights(huge):
    assert huge.ByteSize() < 10_000


def test_a_trace_grows_with_no_dimension(huge):
    assert ops(huge) == ops(trace_block(Mlp(4, 6, "gelu_tanh"), "float32"))


def test_a_block_traced_twice_gives_the_same_bytes():
    assert len({trace_block(GEMMA_NORM, "float32").SerializeToString(deterministic=True) for _ in range(2)}) == 1


def test_bf16_is_traced_though_onnx_runtime_has_no_cpu_kernels_for_it():
    model = trace_block(GEMMA_NORM, "bfloat16")
    onnx.checker.check_model(model, full_check=True)
    assert dtype_of(model.graph.output[0]) == "bfloat16"


def test_a_body_is_named_for_what_it_was_made_for():
    body = trace_body("Rope", {"interleaved": 0}, ["float16"] * 3, [["B", "H", "T", 10], ["B", "T", 5], ["B", "T", 5]])
    assert (body.domain, body.name) == (DOMAIN, "Rope__float16__D_10__R_5__interleaved_0")
    assert (list(body.input), list(body.output), list(body.attribute)) == (["x", "cos", "sin"], ["y"], ["interleaved"])


def test_a_body_for_dynamic_sizes_is_named_without_them():
    attributes = {"activation": "silu", "alpha": 0.0, "limit": 0.0}
    names = {trace_body("GatedAct", attributes, ["float32"] * 2, [[b, "T", 9]] * 2).name for b in (1, "B")}
    assert names == {"GatedAct__float32__activation_silu__alpha_0p0__limit_0p0"}
