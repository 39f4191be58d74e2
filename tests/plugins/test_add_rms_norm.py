"""AddRmsNorm against transformers' Gemma and Llama norms, ONNX's RMSNormalization, and float64."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.glm4.modeling_glm4 import Glm4RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llmexport.export.trace import trace_body
from llmexport.plugins.add_rms_norm import add_rms_norm
from llmexport.plugins.spec import DOMAIN
from llmexport.validate.compare import compare
from llmexport.validate.tolerance import Tolerance

SIZES = [(1, 1, 1), (1, 1, 65), (2, 63, 33), (1, 130, 7), (3, 5, 129)]  # B, T, C
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPSILON = 1e-6
FP32 = float(np.finfo(np.float32).eps)


def example(size: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """x, residual and weight; the rows of x have norms that differ by orders of magnitude."""
    b, t, c = size
    seed = torch.Generator().manual_seed(b * t + c)
    x = torch.randn(b, t, c, generator=seed) * torch.logspace(-2, 2, t).unsqueeze(-1)
    return [v.to(dtype) for v in (x, torch.randn(b, t, c, generator=seed), torch.randn(c, generator=seed))]


def numbers(value: torch.Tensor) -> np.ndarray:
    return value.double().numpy()


def published(kind: type[torch.nn.Module], weight: torch.Tensor) -> torch.nn.Module:
    norm = kind(len(weight), eps=EPSILON).requires_grad_(False)
    norm.weight.data = weight
    return norm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_rounding_after_the_weight_is_gemmas_norm_of_the_sum_bit_for_bit(size, dtype):
    x, residual, weight = example(size, dtype)
    y, _ = add_rms_norm(x, residual, weight, None, EPSILON, 1.0, False)
    assert torch.equal(y, published(GemmaRMSNorm, weight)(x + residual))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_rounding_before_the_weight_is_llamas_norm_of_the_sum_bit_for_bit(size, dtype):
    x, residual, weight = example(size, dtype)
    y, _ = add_rms_norm(x, residual, weight, None, EPSILON, 0.0, True)
    assert torch.equal(y, published(LlamaRMSNorm, weight)(x + residual))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("kind", "offset", "early"), [(Gemma2RMSNorm, 1.0, False), (Glm4RMSNorm, 0.0, True)])
def test_a_normed_summand_is_that_of_gemma2_and_glm4_bit_for_bit(kind, offset, early, size, dtype):
    """As their decoder layers write it: residual + post_norm(x), and the norm behind it."""
    x, residual, weight = example(size, dtype)
    inner = weight.flip(0)
    expected = residual + published(kind, inner)(x)
    y, total = add_rms_norm(x, residual, weight, inner, EPSILON, offset, early)
    assert torch.equal(total, expected)
    assert torch.equal(y, published(kind, weight)(expected))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_an_offset_before_the_weight_is_rounded_with_it(dtype):
    x, residual, weight = example((2, 63, 33), dtype)
    y, _ = add_rms_norm(x, residual, weight, None, EPSILON, 1.0, True)
    assert torch.equal(y, published(LlamaRMSNorm, weight + 1.0)(x + residual))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_the_two_rounding_orders_differ(dtype):
    example_values = example((2, 63, 33), dtype)
    before, after = (add_rms_norm(*example_values, None, EPSILON, 0.0, order)[0] for order in (True, False))
    assert not torch.equal(before, after)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_sum_is_torchs_own(size, dtype):
    x, residual, weight = example(size, dtype)
    assert torch.equal(add_rms_norm(x, residual, weight, None, EPSILON, 0.0, True)[1], x + residual)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    size=st.tuples(*[st.integers(1, n) for n in (3, 9, 70)]),
    epsilon=st.sampled_from([1e-6, 1e-5, 0.25]),
    rounds_before=st.booleans(),
)
def test_equals_onnx_rms_normalization_of_the_sum_at_any_size(size, epsilon, rounds_before):
    x, residual, weight = example(size)
    values = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in ("x", "w", "y")]
    node = onnx.helper.make_node("RMSNormalization", ["x", "w"], ["y"], epsilon=epsilon)
    graph = onnx.helper.make_graph([node], "g", values[:2], values[2:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)])
    feeds = {"x": (x + residual).numpy(), "w": weight.numpy()}
    expected = ReferenceEvaluator(model).run(None, feeds)[0]
    y, _ = add_rms_norm(x, residual, weight, None, epsilon, 0.0, rounds_before)
    # Squares are summed in another order, and roots and quotients round once more or less.
    assert compare(expected, y.numpy()).excess(Tolerance(4 * FP32, 2 * FP32, scaled=True)) <= 1


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("size", SIZES)
def test_is_the_formula_in_float64(size, offset):
    x, residual, weight = example(size)
    total = numbers(x) + numbers(residual)
    rms = np.sqrt((total**2).mean(-1, keepdims=True) + EPSILON)
    exact = total / rms * (numbers(weight) + offset)
    y, _ = add_rms_norm(x, residual, weight, None, EPSILON, offset, False)
    # x + residual, the root, 1 / root, weight + offset and two products round once each. The terms of the sum
    # may cancel: what it rounds away is small against them, not against it.
    terms = (np.abs(numbers(x)) + np.abs(numbers(residual))) / rms * (np.abs(numbers(weight)) + offset)
    assert (np.abs(numbers(y) - exact) <= 4 * FP32 * terms).all()


def test_epsilon_keeps_a_row_of_zeros_finite():
    zeros = torch.zeros(1, 2, 5)
    y, total = add_rms_norm(zeros, zeros, torch.ones(5), None, EPSILON, 0.0, True)
    assert torch.equal(y, zeros)
    assert torch.equal(total, zeros)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("rounds_before", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_body_in_onnx_runtime_equals_the_reference_at_other_sizes(dtype, rounds_before, normed):
    attributes = {"epsilon": EPSILON, "weight_offset": 1.0, "round_before_weight": rounds_before}
    shapes = {"x": ["B", "T", "C"], "residual": ["B", "T", "C"], "weight": ["C"]} | ({"inner": ["C"]} if normed else {})
    body = trace_body("AddRmsNorm", attributes, [dtype] * len(shapes), list(shapes.values()))
    element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    outputs = {"y": ["B", "T", "C"], "sum": ["B", "T", "C"]}
    values = [onnx.helper.make_tensor_value_info(n, element, s) for n, s in (shapes | outputs).items()]
    attributes["round_before_weight"] = int(rounds_before)
    node = onnx.helper.make_node(body.name, list(shapes), list(outputs), domain=DOMAIN, **attributes)
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", values[:-2], values[-2:]),
        functions=[body],
        opset_imports=[onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for size in SIZES:
        inputs = example(size, getattr(torch, dtype))
        inputs += [inputs[2].flip(0)] if normed else []
        y, total = add_rms_norm(*inputs, *([] if normed else [None]), EPSILON, 1.0, rounds_before)
        feeds = {n: v.numpy() for n, v in zip(shapes, inputs, strict=True)}
        found_y, found_total = session.run(None, feeds)
        # Squares summed in another order move the root by an fp32 epsilon or two, which may take fp16 to its
        # next number: one eps, and another where the product with the weight rounds.
        eps = 4 * FP32 if dtype == "float32" else 2 * float(np.finfo(np.float16).eps)
        assert compare(numbers(y), found_y).excess(Tolerance(eps, eps, scaled=True)) <= 1
        assert compare(numbers(total), found_total).excess(Tolerance(eps, eps, scaled=True)) <= (1 if normed else 0)
