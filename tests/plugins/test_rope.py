"""Rope against ONNX's RotaryEmbedding, transformers' Gemma and GLM-4 models, and float64."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from transformers.models.gemma import modeling_gemma
from transformers.models.glm4 import modeling_glm4
from transformers.models.llama4 import modeling_llama4
from transformers.models.qwen3_5 import modeling_qwen3_5

from llmexport.export.trace import trace_body
from llmexport.plugins.rope import rope
from llmexport.plugins.spec import DOMAIN
from llmexport.validate.compare import compare
from llmexport.validate.tolerance import TOLERANCE

# B, H, T, D, R
SIZES = [(1, 1, 1, 2, 1), (2, 3, 63, 10, 5), (1, 2, 130, 14, 3), (3, 5, 63, 7, 2)]
WHOLE_HEAD = [size for size in SIZES if size[3] == 2 * size[4]]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def example(size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """x, cos and sin, the angles those of random positions."""
    b, h, t, d, r = size
    seed = torch.Generator().manual_seed(sum(size))
    angles = torch.rand(b, t, r, generator=seed) * 1000
    return [v.to(dtype) for v in (torch.randn(b, h, t, d, generator=seed), angles.cos(), angles.sin())]


def numbers(value: torch.Tensor) -> np.ndarray:
    return value.double().numpy()


def onnx_rotary_embedding(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, interleaved: bool) -> np.ndarray:
    """RotaryEmbedding-23 in the onnx reference evaluator, angles given row by row, without positions."""
    node = onnx.helper.make_node(
        "RotaryEmbedding",
        ["x", "cos", "sin"],
        ["y"],
        interleaved=int(interleaved),
        rotary_embedding_dim=2 * cos.shape[-1] if 2 * cos.shape[-1] < x.shape[-1] else 0,
    )
    values = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in ("x", "cos", "sin", "y")]
    graph = onnx.helper.make_graph([node], "g", values[:3], values[3:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)])
    return ReferenceEvaluator(model).run(None, {"x": x, "cos": cos, "sin": sin})[0]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_equals_onnx_rotary_embedding(size, interleaved):
    x, cos, sin = example(size)
    expected = onnx_rotary_embedding(x.numpy(), cos.numpy(), sin.numpy(), interleaved)
    assert compare(expected, rope(x, cos, sin, interleaved).numpy()).max_abs == 0


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(*[st.integers(1, n) for n in (3, 4, 9, 8)]),
    rest=st.integers(0, 5),
    interleaved=st.booleans(),
)
def test_equals_onnx_rotary_embedding_at_any_size(sizes, rest, interleaved):
    b, h, t, r = sizes
    x, cos, sin = example((b, h, t, 2 * r + rest, r))
    expected = onnx_rotary_embedding(x.numpy(), cos.numpy(), sin.numpy(), interleaved)
    assert compare(expected, rope(x, cos, sin, interleaved).numpy()).max_abs == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", WHOLE_HEAD)
def test_half_split_is_gemma_in_fp32_rounded_once(size, dtype):
    x, cos, sin = example(size, dtype)
    both = [torch.cat((v, v), -1).float() for v in (cos, sin)]
    expected = modeling_gemma.apply_rotary_pos_emb(x.float(), x.float(), *both)[0].to(dtype)
    assert compare(numbers(expected), numbers(rope(x, cos, sin, False))).max_abs == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_interleaved_is_glm4_in_fp32_rounded_once(size, dtype):
    x, cos, sin = example(size, dtype)
    both = [torch.cat((v, v), -1).float() for v in (cos, sin)]
    expected = modeling_glm4.apply_rotary_pos_emb(x.float(), x.float(), *both)[0].to(dtype)
    assert compare(numbers(expected), numbers(rope(x, cos, sin, True))).max_abs == 0


def in_two_dimensions(rows: torch.Tensor, columns: torch.Tensor, size: int) -> torch.Tensor:
    """The angles [T, size/2] of patches: the first half turns by the one place, the second by the other."""
    steps = 1.0 / 10000.0 ** (torch.arange(0, size // 2, 2).float() / (size // 2))
    return torch.cat([places.float().unsqueeze(-1) * steps for places in (rows, columns)], -1)


def test_turns_packed_patches_as_qwen3_5_does() -> None:
    """Pictures of 2 x 4 and of 6 x 4 patches in one row, heads of 72: rows and columns cat, in halves."""
    places = torch.cat([torch.cartesian_prod(torch.arange(h), torch.arange(w)) for h, w in ((2, 4), (6, 4))])
    angles = in_two_dimensions(*places.T, 72)
    both = torch.cat((angles, angles), -1)
    x = torch.randn(len(places), 3, 72, generator=torch.Generator().manual_seed(0))
    expected = modeling_qwen3_5.apply_rotary_pos_emb_vision(x, x, both.cos(), both.sin())[0]
    found = rope(x.transpose(0, 1)[None], angles.cos()[None], angles.sin()[None], False)
    assert compare(expected.transpose(0, 1)[None].numpy(), found.numpy()).max_abs == 0


def test_turns_tiles_as_llama4_does() -> None:
    """Two tiles of 3 x 3 patches and a class token, which does not turn, heads of 88: columns and rows, interleaved."""
    patch = torch.arange(9)
    angles = in_two_dimensions(patch % 3 + 1, patch // 3 + 1, 88)
    angles = torch.cat((angles, torch.zeros(1, 44)))
    x = torch.randn(2, 10, 3, 88, generator=torch.Generator().manual_seed(0))
    turns = torch.polar(torch.ones_like(angles), angles)
    expected = modeling_llama4.vision_apply_rotary_emb(x, x, turns)[0].transpose(1, 2)
    found = rope(x.transpose(1, 2), *(a.expand(2, -1, -1) for a in (angles.cos(), angles.sin())), True)
    assert compare(numbers(expected), numbers(found)).excess(TOLERANCE["float32"]) <= 1
    assert torch.equal(found[:, :, -1], x.transpose(1, 2)[:, :, -1])


def is_turned(found: np.ndarray, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> bool:
    """Whether each pair is turned as a complex number in float64, and what lies beyond as it was."""
    b, h, t, _ = x.shape
    r = cos.shape[-1]
    turned = numbers(x)[..., : 2 * r]
    pairs = turned.reshape(b, h, t, r, 2) if interleaved else turned.reshape(b, h, t, 2, r).swapaxes(-1, -2)
    angle = (numbers(cos) + 1j * numbers(sin))[:, None]
    exact = (pairs[..., 0] + 1j * pairs[..., 1]) * angle
    exact = np.stack((exact.real, exact.imag), -1 if interleaved else -2).reshape(turned.shape)
    # Two products and their sum in fp32, then at most half a unit in the last place of the result's dtype.
    summands = np.abs(pairs).max(-1).repeat(2, -1) if interleaved else np.tile(np.abs(pairs).max(-1), 2)
    bound = 3 * torch.finfo(torch.float32).eps * summands + torch.finfo(x.dtype).eps / 2 * np.abs(exact)
    tiny = torch.finfo(x.dtype).tiny * torch.finfo(x.dtype).eps
    near = np.abs(found[..., : 2 * r] - exact) <= bound + tiny
    return bool(near.all()) and np.array_equal(found[..., 2 * r :], numbers(x)[..., 2 * r :])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(2, 3, 63, 11, 4), (1, 2, 33, 72, 36), (2, 2, 10, 88, 44)])
def test_turns_each_pair_as_a_complex_number_in_float64(size, dtype, interleaved):
    x, cos, sin = example(size, dtype)
    assert is_turned(numbers(rope(x, cos, sin, interleaved)), x, cos, sin, interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dimensions_beyond_the_rotated_pass_through(dtype, interleaved):
    x, cos, sin = example((2, 3, 63, 11, 4), dtype)
    assert torch.equal(rope(x, cos, sin, interleaved)[..., 8:], x[..., 8:])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("d", "r"), [(11, 4), (8, 4)])
def test_body_in_onnx_runtime_is_right_at_other_sizes(d, r, dtype, interleaved):
    body = trace_body(
        "Rope", {"interleaved": interleaved}, [dtype] * 3, [["B", "H", "T", d], ["B", "T", r], ["B", "T", r]]
    )
    element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    shapes = {"x": ["B", "H", "T", d], "cos": ["B", "T", r], "sin": ["B", "T", r], "y": ["B", "H", "T", d]}
    values = [onnx.helper.make_tensor_value_info(n, element, shape) for n, shape in shapes.items()]
    node = onnx.helper.make_node(
        body.name,
        ["x", "cos", "sin"],
        ["y"],
        domain=DOMAIN,
        interleaved=int(interleaved),
    )
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", values[:3], values[3:]),
        functions=[body],
        opset_imports=[onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for size in [(1, 1, 1, d, r), (3, 2, 63, d, r), (1, 5, 130, d, r)]:
        x, cos, sin = example(size, getattr(torch, dtype))
        found = session.run(None, {"x": x.numpy(), "cos": cos.numpy(), "sin": sin.numpy()})[0]
        # ONNX Runtime's own operator may round a product and the sum at once, where the reference rounds both.
        assert is_turned(found.astype(np.float64), x, cos, sin, interleaved)
