"""Traces: a block's graph holds no weights, is right at every size, and says what its ports say."""

import onnx
import onnxruntime
import pytest
import torch
from trace_cases import (
    ALL,
    CASES,
    DELTA_MIX,
    DELTA_NET,
    GEMMA_NORM,
    KIMI_DELTA,
    LAST,
    LATENT,
    LAYER,
    MOE,
    PARAMETERS,
    SANDWICH,
    SINKS,
)

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
    Block,
    Mask,
    Mixer,
    Mlp,
    Port,
    TimeMix,
)
from llmexport.export.trace import SIZES, torch_dtype, trace_block, trace_body
from llmexport.graphs.bodies import attach_bodies
from llmexport.plugins.spec import DOMAIN, VERSION
from llmexport.validate.compare import compare
from llmexport.validate.feeds import block_feed
from llmexport.validate.runners import to_torch
from llmexport.validate.tolerance import Tolerance

# batch, sequence, past: a decode step, a first token, prefills longer than what was traced, and a chunk.
RUNS = [(1, 1, 6), (1, 1, 0), (3, 63, 0), (1, 130, 0), (2, 5, 130)]


@pytest.fixture(scope="module", params=PARAMETERS, ids=lambda case: f"{case[0].kind}-{case[1]}")
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
