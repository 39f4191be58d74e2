"""GatedDeltaNet against transformers' Qwen3.5, against the block that it stands for, and its body in ONNX Runtime."""

import importlib.util

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kernel_numbers import UNIT
from one_node import body_model, rtx_build, session
from torch import Tensor
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as qwen

from llmexport.export import spec
from llmexport.export.blocks.delta import GatedDeltaNet
from llmexport.plugins.gated_delta_net import gated_delta_net
from llmexport.validate.compare import compare
from llmexport.validate.tolerance import TOLERANCE, Tolerance

G, H, D, V = 2, 4, 16, 12
SIZES = {"C": 2 * G * D + H * V, "O": 1, "K": 4, "S": 3, "H": H, "D": D, "V": V}
EPSILON = 1e-6
RULE = {"scale": D**-0.5, "l2_norm": True}
SAID = {**RULE, "epsilon": EPSILON, "activation": "silu", "round_before_weight": True}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOKENS = [1, 7, 63, 65]


def example(tokens: int, dtype: torch.dtype = torch.float32, padded: bool = False) -> list[Tensor]:
    """The inputs; a row of padded ones begins with padding. Some steps are past where softplus is linear."""
    seed = torch.Generator().manual_seed(tokens)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=seed)

    mixed, a, b, z = randn(2, tokens, SIZES["C"]), 9 * randn(2, tokens, H), randn(2, tokens, H), randn(2, tokens, H, V)
    present = torch.ones(2, tokens)
    present[0, : (tokens + 1) // 2] = 1 - int(padded)
    a_log, dt_bias, weight = randn(H) - 2, randn(H), 1 + 0.2 * randn(V)
    rest = [x.to(dtype) for x in (a, b, present, a_log, dt_bias, z, weight)]
    convolution = [randn(SIZES["C"], 1, 4).to(dtype), randn(2, 3, SIZES["C"]).to(dtype)]
    end = torch.tensor([tokens, tokens - 1], dtype=torch.int32)
    return [mixed.to(dtype), *convolution, end, *rest, randn(2, H, D, V)]


def numbers(value: Tensor) -> np.ndarray:
    return value.double().numpy()


@pytest.mark.parametrize("tokens", TOKENS)
def test_is_qwen3_5s_in_fp32(tokens):
    inputs = example(tokens)
    mixed, conv_weight, conv_state, _, a, b, _, a_log, dt_bias, z, weight, state = inputs
    seen = torch.cat((conv_state, mixed), 1).transpose(1, 2)
    mixed = F.silu(F.conv1d(seen, conv_weight, groups=SIZES["C"])).transpose(1, 2)
    after_conv = torch.stack((seen[0, :, tokens:], seen[1, :, tokens - 1 : -1])).transpose(1, 2)
    q, k, v = mixed.split([G * D, G * D, H * V], -1)
    q, k = (x.reshape(2, tokens, G, D).repeat_interleave(H // G, 2) for x in (q, k))
    g, beta = -a_log.exp() * F.softplus(a + dt_bias), b.sigmoid()
    rule, norm = qwen.torch_recurrent_gated_delta_rule, qwen.Qwen3_5MoeRMSNormGated(V, eps=EPSILON)
    norm.weight.data = weight
    y, after = rule(q, k, v.reshape(2, tokens, H, V), g, beta, state, True, use_qk_l2norm_in_kernel=True)
    expected = norm(y.reshape(-1, V), z.reshape(-1, V)).reshape(z.shape).detach()
    for want, have in zip((expected, after_conv, after), gated_delta_net(*inputs, **SAID), strict=True):
        assert compare(numbers(want), numbers(have)).excess(TOLERANCE["float32"]) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_is_what_the_block_computes_with_padding_too(tokens, dtype):
    inputs = example(tokens, dtype, padded=True)
    mixed, conv_weight, conv_state, end, a, b, present, a_log, dt_bias, z, weight, state = inputs
    block = GatedDeltaNet(spec.GatedDeltaNet(8, G, D, H, V, kernel=4, epsilon=EPSILON)).to(dtype)
    block.A_log.data, block.dt_bias.data, block.norm.weight.data = a_log, dt_bias, weight
    block.conv1d.weight.data = conv_weight
    expected = block.recalled(mixed, z, b, a, present, end, conv_state, state)
    for want, have in zip(expected, gated_delta_net(*inputs, **SAID), strict=True):
        assert want.dtype == have.dtype
        assert torch.equal(want, have)


def test_padding_leaves_the_state_as_it_is():
    inputs = example(7)
    inputs[6][0] = 0
    _, _, after = gated_delta_net(*inputs, **SAID)
    assert torch.equal(after[0], inputs[-1][0])
    assert not torch.equal(after[1], inputs[-1][1])


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="'relu'"):
        gated_delta_net(*example(1), **{**SAID, "activation": "relu"})


@pytest.mark.parametrize("norm", [{}, {"activation": "sigmoid", "round_before_weight": False}], ids=["silu", "sigmoid"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("l2_norm", [True, False])
def test_body_in_onnx_runtime_equals_the_reference_at_any_length(l2_norm, dtype, norm):
    said = {**SAID, **norm, "l2_norm": l2_norm, "scale": 0.25 if l2_norm else 0.01}
    model = body_model("GatedDeltaNet", said, dtype, SIZES)
    runtime = session(model)
    for tokens in TOKENS:
        inputs = example(tokens, getattr(torch, dtype), padded=True)
        if not l2_norm:
            inputs[1] *= 0.1
        feeds = {i.name: x.numpy() for i, x in zip(model.graph.input, inputs, strict=True)}
        found, after_conv, after = runtime.run(None, feeds)
        gated, conv_state, state = gated_delta_net(*inputs, **said)
        assert found.dtype == np.dtype(dtype)
        assert after_conv.tobytes() == conv_state.numpy().tobytes()
        # beta, y, the norm twice and the product are rounded, each of which may fall on the other side of a tie.
        unit = UNIT["fp32" if dtype == "float32" else "fp16"] * 8
        fp32 = TOLERANCE["float32"]
        bound = fp32 if dtype == "float32" else Tolerance(unit, unit, scaled=True)
        assert compare(numbers(gated), found.astype(np.float64)).excess(bound) <= 1
        assert compare(numbers(state), after.astype(np.float64)).excess(bound) <= 1


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="pip install tensorrt-rtx")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.engine
def test_rtx_builds_the_body(dtype, tmp_path):
    model = body_model("GatedDeltaNet", SAID, dtype, SIZES)
    assert rtx_build(model, {"B": (1, 2, 4), "T": (1, 63, 512)}, tmp_path) == ["built"]
