"""QkNormRopeWrite against transformers' static cache and onnx's evaluator, and against its body in ONNX Runtime."""

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from kernel_numbers import UNIT
from one_node import body_model, run_operator, session
from torch import Tensor

from llmexport.plugins.qk_norm_rope import qk_norm_rope
from llmexport.plugins.qk_norm_rope_write import qk_norm_rope_write
from llmexport.validate.compare import compare
from llmexport.validate.tolerance import Tolerance

# B, T, H, G, D, R, S
SIZES = [(1, 1, 1, 1, 2, 1, 1), (2, 7, 3, 1, 10, 5, 20), (3, 1, 4, 2, 12, 3, 16), (2, 5, 2, 2, 7, 2, 9)]
DTYPES = ["float32", "float16", "bfloat16"]
SAID = {"interleaved": False, "epsilon": 1e-6, "weight_offset": 1.0, "round_before_weight": True, "norm_first": True}


def example(size: tuple[int, ...], dtype: str = "float32") -> list[Tensor]:
    """q, k, v, angles, a cache, another first slot of each row, and two weights."""
    b, t, h, g, d, r, s = size
    seed = torch.Generator().manual_seed(sum(size))
    shapes = [(b, t, h, d), (b, t, g, d), (b, t, g, d), (b, t, r), (b, t, r), (b, g, s, d), (b, g, s, d), (d,), (d,)]
    made = [torch.randn(shape, generator=seed).to(getattr(torch, dtype)) for shape in shapes]
    first = (s - t - torch.arange(b)).clamp(0).to(torch.int32)
    return [*made[:7], first, *made[7:]]


def step_of(given: list[Tensor]) -> list[Tensor]:
    """What QkNormRope takes of the same."""
    return [*given[:5], *given[8:]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_caches_are_tensor_scatters_of_what_qk_norm_rope_makes(size: tuple[int, ...], dtype: str) -> None:
    given = example(size, dtype)
    query, *made = qk_norm_rope(*step_of(given), **SAID)
    found = qk_norm_rope_write(*given, **SAID)
    assert torch.equal(query, found[0])
    for past, new, cache in zip(given[5:7], made, found[1:], strict=True):
        arrays = [past.float().numpy(), new.float().numpy(), given[7].numpy().astype(np.int64)]
        [wanted] = run_operator("TensorScatter", "", 24, arrays, 1, axis=-2)
        assert cache.dtype == past.dtype
        assert np.array_equal(wanted, cache.float().numpy())


def test_caches_are_those_of_transformers() -> None:
    """Its StaticLayer, which writes all rows from one slot on."""
    from transformers.cache_utils import StaticLayer

    given = example((2, 3, 4, 2, 8, 4, 16))
    given[7][:] = 5
    _, key, value = qk_norm_rope(*step_of(given), **SAID)
    layer = StaticLayer(max_cache_len=16)
    layer.update(given[5][:, :, :5], given[6][:, :, :5], {"cache_position": torch.arange(5)})
    wanted = layer.update(key, value, {"cache_position": torch.arange(5, 8)})
    _, *found = qk_norm_rope_write(*given, **SAID)
    assert all(torch.equal(w[:, :, :8], f[:, :, :8]) for w, f in zip(wanted, found, strict=True))


@pytest.mark.parametrize("first", [-1, 14, 16])
def test_a_slot_that_is_none_is_an_error(first: int) -> None:
    given = example((2, 3, 4, 2, 8, 4, 16))
    given[7][1] = first
    with pytest.raises(ValueError, match="a static cache of 16 slots has no slot"):
        qk_norm_rope_write(*given, **SAID)


def test_one_weight_alone_is_refused() -> None:
    given = example(SIZES[0])
    with pytest.raises(ValueError, match="both q and k, or neither"):
        qk_norm_rope_write(*given[:9], None, **SAID)


def opset_24(model: onnx.ModelProto) -> onnx.ModelProto:
    """As a model with a static cache is."""
    for opsets in (model.opset_import, *(f.opset_import for f in model.functions)):
        next(o for o in opsets if not o.domain).version = 24
    return model


@pytest.mark.parametrize("without", [0, 2])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_body_in_onnx_runtime_equals_the_reference_at_other_sizes(
    dtype: str, interleaved: bool, without: int, static_caches: None
) -> None:
    said = {**SAID, "interleaved": interleaved}
    for d, r in ((12, 3), (8, 4)):
        model = opset_24(body_model("QkNormRopeWrite", said, dtype, {"Q": d, "D": d, "R": r}, without))
        runtime = session(model)
        for b, t, h, g, s in ((1, 1, 1, 1, 1), (2, 13, 3, 1, 40), (3, 5, 4, 2, 16)):
            given = example((b, t, h, g, d, r, s), dtype)[: 10 - without]
            feeds = {i.name: x.numpy() for i, x in zip(model.graph.input, given, strict=True)}
            found = runtime.run(None, feeds)
            expected = qk_norm_rope_write(*given, *[None] * without, **said)
            # As of QkNormRope.
            unit = UNIT["fp32" if dtype == "float32" else "fp16"] * 8
            for want, have in zip(expected, found, strict=True):
                bound = Tolerance(unit, unit, scaled=True)
                assert compare(want.double().numpy(), have.astype(np.float64)).excess(bound) <= 1


def test_body_has_no_node_that_its_parts_have_not() -> None:
    """In ONNX Runtime an op of ours costs what the nodes in it cost."""
    sizes = {"Q": 8, "D": 8, "R": 4}
    step, both = (body_model(n, SAID, "float32", sizes).functions[0] for n in ("QkNormRope", "QkNormRopeWrite"))
    counted = [Counter(n.op_type for n in body.node) for body in (step, both)]
    assert counted[1] == counted[0] + Counter({"TensorScatter": 2, "Cast": 1})
