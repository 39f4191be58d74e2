"""QkNormRope against transformers' Qwen3, Qwen3.5 and Llama 4, and against its body in ONNX Runtime."""

from collections import Counter

import numpy as np
import pytest
import torch
from kernel_numbers import UNIT
from one_node import body_model, session
from torch import Tensor
from transformers.models.llama4 import modeling_llama4
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3_5 import modeling_qwen3_5

from llmexport.plugins.qk_norm_rope import qk_norm_rope
from llmexport.validate.compare import compare
from llmexport.validate.tolerance import TOLERANCE, Tolerance

# B, T, H, G, D, R
SIZES = [(1, 1, 1, 1, 2, 1), (2, 7, 3, 1, 10, 5), (1, 63, 4, 2, 12, 3), (2, 13, 2, 2, 7, 2)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPSILON = 1e-6
PLAIN = {"epsilon": EPSILON, "weight_offset": 0.0, "round_before_weight": True}
SHIFTED = {"epsilon": EPSILON, "weight_offset": 1.0, "round_before_weight": False}


def example(size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v, the cos and sin of random positions, and two weights."""
    b, t, h, g, d, r = size
    seed = torch.Generator().manual_seed(sum(size))
    angles = torch.rand(b, t, r, generator=seed) * 1000
    q, k, v = (torch.randn(b, t, n, d, generator=seed) for n in (h, g, g))
    weights = (torch.randn(2, d, generator=seed) * 0.2 + 1).unbind()
    return [x.to(dtype) for x in (3 * q, k, v, angles.cos(), angles.sin(), *weights)]


def with_more(q: Tensor, behind: int) -> Tensor:
    """q with so many numbers behind each head."""
    return torch.cat((q, torch.full((*q.shape[:-1], behind), 7.0, dtype=q.dtype)), -1)


def numbers(value: Tensor) -> np.ndarray:
    return value.double().numpy()


def same(expected: Tensor, found: Tensor) -> bool:
    return expected.dtype == found.dtype and compare(numbers(expected), numbers(found)).max_abs == 0


def halves_turned(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """x [B, heads, T, D] by Qwen3's function in fp32, rounded once."""
    both = [torch.cat((a, a), -1).float() for a in (cos, sin)]
    turned: Tensor = modeling_qwen3.apply_rotary_pos_emb(x.float(), x.float(), *both)[0]
    return turned.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [s for s in SIZES if s[4] == 2 * s[5]])
@pytest.mark.parametrize(
    ("norm", "attributes"), [(modeling_qwen3.Qwen3RMSNorm, PLAIN), (modeling_qwen3_5.Qwen3_5RMSNorm, SHIFTED)]
)
def test_norm_before_rotary_is_qwen3s_and_qwen3_5s(norm, attributes, size, dtype):
    q, k, v, cos, sin, *weights = example(size, dtype)
    found = qk_norm_rope(q, k, v, cos, sin, *weights, False, **attributes, norm_first=True)
    for x, weight, y in zip((q, k), weights, found, strict=False):
        module = norm(size[4], eps=EPSILON).to(dtype)
        module.weight.data = weight
        assert same(halves_turned(module(x).detach().transpose(1, 2), cos, sin, dtype), y)
    assert torch.equal(found[2], v.transpose(1, 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_lies_behind_a_head_of_q_is_not_read(dtype):
    """As the gate of Qwen3NextAttention's and Qwen3_5Attention's q_proj."""
    q, *others = example((2, 7, 3, 1, 10, 5), dtype)
    given = (*others, False)
    expected = qk_norm_rope(q, *given, **SHIFTED, norm_first=True)
    found = qk_norm_rope(with_more(q, 10), *given, **SHIFTED, norm_first=True)
    assert all(same(e, f) for e, f in zip(expected, found, strict=True))


def test_norm_after_rotary_is_llama4s():
    q, k, v, cos, sin, *_ = example((2, 13, 4, 2, 16, 8))
    ones = torch.ones(16)
    attributes = {**SHIFTED, "weight_offset": 0.0}
    found = qk_norm_rope(q, k, v, cos, sin, ones, ones, True, **attributes, norm_first=False)
    turned = modeling_llama4.apply_rotary_emb(q, k, torch.complex(cos, sin))
    norm = modeling_llama4.Llama4TextL2Norm(EPSILON)
    for x, y in zip(turned, found, strict=False):
        assert compare(numbers(norm(x).transpose(1, 2)), numbers(y)).excess(TOLERANCE["float32"]) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_without_weights_heads_only_turn(size, dtype):
    q, k, v, cos, sin, *_ = example(size, dtype)
    rotated = 2 * size[5]
    query, key, value = qk_norm_rope(q, k, v, cos, sin, None, None, False, **PLAIN, norm_first=True)
    for x, y in ((q, query), (k, key)):
        turned = halves_turned(x[..., :rotated].transpose(1, 2), cos, sin, dtype)
        assert same(torch.cat((turned, x.transpose(1, 2)[..., rotated:]), -1), y)
    assert torch.equal(value, v.transpose(1, 2))


def test_the_two_orders_differ_where_a_weight_does():
    given = example((1, 7, 2, 1, 8, 4))
    first, last = (qk_norm_rope(*given, False, **PLAIN, norm_first=first)[0] for first in (True, False))
    assert compare(numbers(first), numbers(last)).rms_ratio > 0.1


def test_one_weight_alone_is_refused():
    q, k, v, cos, sin, weight, _ = example(SIZES[0])
    with pytest.raises(ValueError, match="both q and k, or neither"):
        qk_norm_rope(q, k, v, cos, sin, weight, None, False, **PLAIN, norm_first=True)


@pytest.mark.parametrize("behind", [0, 5])
@pytest.mark.parametrize("without", [0, 2])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("attributes", [PLAIN, SHIFTED])
def test_body_in_onnx_runtime_equals_the_reference_at_other_sizes(
    attributes, dtype, interleaved, norm_first, without, behind
):
    said = {"interleaved": interleaved, **attributes, "norm_first": norm_first}
    for d, r in ((12, 3), (8, 4)):
        model = body_model("QkNormRope", said, dtype, {"Q": d + behind, "D": d, "R": r}, without)
        runtime = session(model)
        for b, t, h, g in ((1, 1, 1, 1), (2, 63, 3, 1), (1, 5, 4, 2)):
            given = example((b, t, h, g, d, r), getattr(torch, dtype))[: 7 - without]
            given[0] = with_more(given[0], behind)
            feeds = {i.name: x.numpy() for i, x in zip(model.graph.input, given, strict=True)}
            found = runtime.run(None, feeds)
            expected = qk_norm_rope(*given, *[None] * without, **said)
            # The norm rounds up to three times, and the rotation adds two of its numbers and rounds again.
            unit = UNIT["fp32" if dtype == "float32" else "fp16"] * 8
            for want, have in zip(expected, found, strict=True):
                assert compare(numbers(want), have.astype(np.float64)).excess(Tolerance(unit, unit, scaled=True)) <= 1


def test_body_has_no_node_that_its_parts_have_not():
    """In ONNX Runtime an op of ours costs what the nodes in it cost."""
    said = {"interleaved": False, **PLAIN, "norm_first": True}
    body = body_model("QkNormRope", said, "float32", {"Q": 8, "D": 8, "R": 4}).functions[0]
    counted = Counter(n.op_type for n in body.node)
    assert counted == {"Transpose": 3, "RotaryEmbedding": 2, "RMSNormalization": 2, "CastLike": 4}
