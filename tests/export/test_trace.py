"""Traces: a block's graph holds no weights, is right at every size, and says what its ports say."""

from collections.abc import Iterator

import onnx
import onnxruntime
import pytest
import torch

from llmexport.export import blocks
from llmexport.export.onnx_file import load_block, load_body
from llmexport.export.spec import (
    BATCH,
    PAST,
    SEQUENCE,
    TOTAL,
    Attention,
    Block,
    DecoderLayer,
    Embedding,
    Head,
    LinearScaling,
    Llama3Scaling,
    Mask,
    Mlp,
    Norm,
    Port,
    Rotary,
)
from llmexport.export.trace import SIZES, torch_dtype, trace_block, trace_body
from llmexport.graphs.bodies import attach_bodies
from llmexport.plugins.spec import DOMAIN
from llmexport.validate.compare import compare
from llmexport.validate.tolerance import Tolerance

LLAMA_NORM = Norm(33, 1e-5)
GEMMA_NORM = Norm(33, 1e-6, 1.0, "after_weight")
LAYER = DecoderLayer(GEMMA_NORM, Attention(33, 6, 2, 10), GEMMA_NORM, Mlp(33, 65, "gelu_tanh"))
CASES = [
    (Embedding(37, 33), "float32"),
    (Embedding(37, 33, 33**0.5), "float16"),
    (Rotary(10, 10000.0), "float32"),
    (Rotary(10, 10000.0, LinearScaling(4.0)), "float32"),
    (Rotary(10, 500000.0, Llama3Scaling(8.0, 1.0, 4.0, 64)), "float16"),
    (Mask(), "float32"),
    (Mask(7), "float32"),
    (LLAMA_NORM, "float32"),
    (LLAMA_NORM, "float16"),
    (Norm(33, 1e-6, 1.0), "float16"),
    (GEMMA_NORM, "float32"),
    (GEMMA_NORM, "float16"),
    (Attention(33, 3, 1, 10), "float32"),
    (Attention(33, 6, 2, 10, qkv_bias=True, out_bias=True), "float32"),
    (Mlp(33, 65, "silu"), "float32"),
    (Mlp(33, 65, "gelu_tanh", bias=True), "float32"),
    (Mlp(33, 65, "gelu_erf"), "float16"),
    (LAYER, "float32"),
    (LAYER, "float16"),
    (Head(LLAMA_NORM, 37), "float32"),
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
        values = torch.randn(parameter.shape, generator=seed) * parameter.shape[-1] ** -0.5
        weight = torch.nn.Parameter(values.to(parameter.dtype), requires_grad=False)
        setattr(module.get_submodule(owner), name, weight)
    return module


def sizes(batch: int, sequence: int, past: int) -> dict[str, int]:
    return {BATCH: batch, SEQUENCE: sequence, PAST: past, TOTAL: sequence + past}


def feeds(block: Block, dtype: str, size: dict[str, int]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every input port filled: angles of a circle, ids in range, a causal mask, left padding."""
    seed = torch.Generator().manual_seed(sum(size.values()))
    angle = torch.rand(size[BATCH], size[SEQUENCE], 5, generator=seed) * 7
    padding = torch.arange(size[TOTAL]) >= torch.arange(size[BATCH]).unsqueeze(-1) % size[TOTAL]
    causal = torch.ones(size[SEQUENCE], size[TOTAL]).tril(size[PAST]).bool().expand(size[BATCH], 1, -1, -1)
    known = {
        "cos": angle.cos().to(torch_dtype(dtype)),
        "sin": angle.sin().to(torch_dtype(dtype)),
        "mask": causal.contiguous(),
        "attention_mask": padding.long(),
        "input_ids": torch.randint(0, 37, (size[BATCH], size[SEQUENCE]), generator=seed),
        "position_ids": torch.arange(size[PAST], size[TOTAL]).expand(size[BATCH], -1).contiguous(),
    }
    for port in block.inputs:
        shape = [size[d] if isinstance(d, str) else d for d in port.shape]
        yield (
            port.name,
            known[port.name] if port.name in known else torch.randn(shape, generator=seed).to(torch_dtype(dtype)),
        )


def with_bodies(model: onnx.ModelProto) -> onnx.ModelProto:
    made = onnx.ModelProto()
    made.CopyFrom(model)
    attach_bodies(made, load_body)
    return made


def test_every_kind_of_block_is_traced_here():
    assert {block.kind for block, _ in CASES} == Block.kinds.keys()


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
        tensors = dict(feeds(block, dtype, sizes(*run)))
        expected = module(*tensors.values())
        expected = expected if isinstance(expected, tuple) else (expected,)
        found = session.run(None, {n: t.numpy() for n, t in tensors.items()} | parameters)
        for port, e, f in zip(block.outputs, expected, found, strict=True):
            difference = compare(e.numpy(), f)
            assert difference.excess(bound) <= 1, f"{port.name} at {run}: {difference}"


def test_a_mask_has_no_row_without_a_key():
    module = filled(Mask(7), "float32")
    for run in RUNS:
        assert module(*dict(feeds(Mask(7), "float32", sizes(*run))).values()).any(-1).all()


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


def test_parameters_have_the_shapes_and_type_of_the_module(case):
    block, dtype, model = case
    expected = {n: tuple(p.shape) for n, p in blocks.module(block, torch_dtype(dtype)).named_parameters()}
    found = {v.name: v for v in model.graph.input if v.name in expected}
    assert {n: dims(v) for n, v in found.items()} == expected
    assert {dtype_of(v) for v in found.values()} <= {dtype}


def test_every_inner_value_is_typed(case):
    model = case[2]
    graph = model.graph
    typed = {v.name for v in (*graph.value_info, *graph.input, *graph.output)} | {t.name for t in graph.initializer}
    assert {n for node in graph.node for n in (*node.input, *node.output) if n} <= typed


def test_the_graph_is_valid(case):
    onnx.checker.check_model(with_bodies(case[2]), full_check=True)


def test_the_graph_imports_one_opset_and_our_domain_at_most(case):
    assert {(o.domain, o.version) for o in case[2].opset_import} <= {("", 23), (DOMAIN, 1)}


def test_the_graph_has_no_bodies(case):
    assert len(case[2].functions) == 0


def ops(model: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in model.graph.node]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_layer_is_written_in_few_and_standard_operators(dtype):
    found = ops(load_block(LAYER, dtype))
    assert {o: found.count(o) for o in ("Attention", "Rope", "RMSNormalization", "MatMul", "Gelu")} == {
        "Attention": 1,
        "Rope": 2,
        "RMSNormalization": 2,
        "MatMul": 7,
        "Gelu": 1,
    }


@pytest.fixture(scope="module")
def huge() -> onnx.ModelProto:
    """The MLP of gemma-2b: 400 MB of weights."""
    return trace_block(Mlp(2048, 16384, "gelu_tanh"), "float32")


def test_a_trace_holds_no_weights(huge):
    assert huge.ByteSize() < 10_000


def test_a_trace_grows_with_no_dimension(huge):
    assert ops(huge) == ops(trace_block(Mlp(4, 6, "gelu_tanh"), "float32"))


def test_a_block_traced_twice_gives_the_same_bytes():
    first, second = (trace_block(GEMMA_NORM, "float32").SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


def test_bf16_is_traced_though_onnx_runtime_has_no_cpu_kernels_for_it():
    model = trace_block(GEMMA_NORM, "bfloat16")
    onnx.checker.check_model(model, full_check=True)
    assert dtype_of(model.graph.output[0]) == "bfloat16"


def test_a_body_is_named_for_what_it_was_made_for():
    body = trace_body("Rope", {"interleaved": 0}, ["float16"] * 3, [["B", "H", "T", 10], ["B", "T", 5], ["B", "T", 5]])
    assert (body.domain, body.name) == (DOMAIN, "Rope")
    assert (list(body.input), list(body.output)) == (["x", "cos", "sin"], ["y"])
    assert list(body.attribute) == ["interleaved"]
    assert body.overload == "float16__D_10__R_5__interleaved_0"


def test_a_body_for_dynamic_sizes_is_named_without_them():
    attributes = {"activation": "silu", "alpha": 0.0, "limit": 0.0}
    names = {trace_body("GatedAct", attributes, ["float32"] * 2, [[b, "T", 9]] * 2).overload for b in (1, "B")}
    assert names == {"float32__activation_silu__alpha_0p0__limit_0p0"}
