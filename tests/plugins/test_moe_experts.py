"""MoeExperts against transformers' experts, ONNX Runtime's MoE and QMoE, and float64."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import example as example_of
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_cases import ALPHA, FORMATS, LAYOUTS, LIMIT, OPTIONAL, C, E, I, K, Layout, decode, exact, example, excess
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeExperts

from llmexport.plugins.microscaling import VALUES
from llmexport.plugins.moe_experts import moe_experts
from llmexport.plugins.moe_experts.formats import dequantise
from llmexport.plugins.packed_formats import PACKED

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOKENS = [(1, 1), (2, 7), (1, 130)]
EVERY = {**LAYOUTS, **FORMATS}
layouts = pytest.mark.parametrize("layout", EVERY.values(), ids=EVERY)


@layouts
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_is_the_definition_in_float64(tokens, dtype, layout):
    tensors = example(layout, tokens, dtype)
    found = layout(tensors)
    assert (found.dtype, found.shape) == (dtype, tensors["x"].shape)
    assert excess(exact(layout, tensors), found) <= 1


@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=4)))
def test_every_layout_is_the_definition_in_float64(flags):
    layout = Layout("gelu_erf", *flags)
    tensors = example(layout)
    assert excess(exact(layout, tensors), layout(tensors)) <= 1


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_is_the_definition_at_any_size(data):
    layout = data.draw(st.sampled_from(list(EVERY.values())))
    step = PACKED[layout.format].per_byte if layout.packed else 1
    experts = data.draw(st.integers(1, 9))
    sizes = (experts, data.draw(st.integers(1, experts)), *(step * data.draw(st.integers(1, 3)) for _ in "CI"))
    tensors = example(layout, (data.draw(st.integers(1, 2)), data.draw(st.integers(1, 9))), sizes=sizes)
    assert excess(exact(layout, tensors), layout(tensors)) <= 1


def published(experts: type[torch.nn.Module], tensors: dict[str, Tensor]) -> Tensor:
    """What transformers' experts give for these tensors."""
    config = SimpleNamespace(
        num_experts=E,
        num_local_experts=E,
        hidden_size=C,
        intermediate_size=I,
        moe_intermediate_size=I,
        hidden_act="silu",
        swiglu_alpha=ALPHA,
        swiglu_limit=LIMIT,
        _experts_implementation="eager",
    )
    module = experts(config).to(tensors["x"].dtype).requires_grad_(False)
    for name, parameter in module.named_parameters():
        parameter.copy_(tensors[name.replace("_proj", "")])
    flat = {n: tensors[n].flatten(0, 1) for n in ("x", "experts", "weights")}
    return module(flat["x"], flat["experts"].long(), flat["weights"]).reshape(tensors["x"].shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(
    ("experts", "layout"),
    [
        (MixtralExperts, "qwen"),
        (Qwen3_5MoeExperts, "qwen"),
        (DeepseekV3Experts, "qwen"),
        (GptOssExperts, "gpt_oss"),
    ],
)
def test_equals_the_experts_of_transformers(experts, layout, tokens, dtype):
    tensors = example(LAYOUTS[layout], tokens, dtype)
    assert excess(published(experts, tensors), LAYOUTS[layout](tensors)) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_mxfp4_equals_gpt_oss_on_the_weights_that_transformers_converts(tokens, dtype):
    tensors = example(LAYOUTS["mxfp4"], tokens, dtype)
    wide = dict(tensors)
    for name in ("gate_up", "down"):
        scales = wide.pop(f"{name}_scales")
        blocks = tensors[name].unflatten(-1, (scales.shape[-1], -1))
        wide[name] = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    assert excess(published(GptOssExperts, wide), LAYOUTS["mxfp4"](tensors)) <= 1


def test_mxfp4_decodes_every_byte_under_every_scale_as_transformers_does():
    packed = torch.arange(256, dtype=torch.uint8).reshape(16, 16).repeat(256, 1, 1)
    scales = torch.arange(256, dtype=torch.uint8).reshape(256, 1, 1).expand(256, 16, 1)
    expected = convert_moe_packed_tensors(packed.unsqueeze(2), scales, dtype=torch.float32).mT
    found = dequantise("mxfp4", 32, packed, scales)
    assert torch.equal(found.view(torch.int32), expected.contiguous().view(torch.int32))
    # 2^-127, the least, is no normal fp32; 2^128, the largest, is infinite.
    assert found[0, 0, 2:4].tolist() == [2.0**-128, 0.0]
    assert found[254, 0, 2:4].tolist() == [2.0**126, 0.0]


@pytest.mark.parametrize("format", PACKED)
def test_every_code_under_every_scale_is_what_ml_dtypes_reads(format):
    form = PACKED[format]
    # The last of E8M0 is NaN there.
    rows = 255 if form.scales and form.group == 32 else 256
    layout = Layout(format=format, group=form.group or 256 * form.per_byte)
    codes = torch.arange(256, dtype=torch.uint8).expand(rows, 256)
    scales = torch.arange(rows).unsqueeze(1).expand(rows, 256 * form.per_byte // layout.group)
    scales = scales.to(torch.uint8) if form.scales else scales / 3
    with np.errstate(over="ignore"):
        expected = decode(layout, "down", {"down": codes.numpy(), "down_scales": scales.numpy()}).astype(np.float32)
    assert np.array_equal(dequantise(format, layout.group, codes, scales).numpy(), expected, equal_nan=True)


def shorter(t: Tensor) -> Tensor:
    return t[..., :-1]


# Of these experts, with another attribute or tensor.
REFUSED = [
    ("qwen", {"format": "int4"}, {}, "knows no format 'int4'"),
    ("qwen", {"group": 32}, {}, "plain weights are floats without scales and group, not float32, 32"),
    ("mxfp4", {"format": "plain", "group": 0}, {}, "plain weights are floats without scales and group, not uint8, 0"),
    ("qwen", {"format": "fp8", "group": 32}, {}, "fp8 weights are uint8 with scales of float32, not float32 with None"),
    ("fp8", {}, {"gate_up_scales": Tensor.byte}, "fp8 weights are uint8 with scales of float32, not uint8 with uint8"),
    ("mxfp8", {"transposed": True}, {}, "mxfp8 weights are never transposed"),
    ("mxfp8", {"group": 16}, {}, "a group has 32 columns in mxfp8, not 16"),
    ("nvfp4", {"group": 32}, {}, "a group has 16 columns in nvfp4, not 32"),
    ("int8", {"group": 0}, {}, "a group has at least 1 columns in int8, not 0"),
    ("uint8-zeros", {"format": "int8"}, {}, "int8 weights have no zero points"),
    ("nvfp4", {}, {"down_factors": lambda t: None}, "factors are float32 of gate_up and of down, not float32 and None"),
    ("uint8-zeros", {}, {"down_zeros": Tensor.float}, "zeros are uint8 of gate_up and of down, not uint8 and float32"),
    ("uint4", {}, {"down": shorter}, r"down is \[6, 64, 15\], not \[6, 64, 16\] of uint4"),
    ("uint4", {}, {"x": shorter}, "64 rows of gate_up and 63 columns of gate_up are odd"),
    ("uint4", {}, {"gate_up_scales": shorter}, r"gate_up_scales is \[6, 64, 2\], not \[6, 64, 3\] of uint4"),
    ("uint4-zeros", {}, {"down_zeros": shorter}, r"down_zeros is \[6, 64, 1\], not \[6, 64, 2\] of uint4"),
    ("nvfp4", {}, {"gate_up_factors": shorter}, r"gate_up_factors is \[6, 1\], not \[6, 2\] of nvfp4"),
    ("nvfp4", {}, {"down_factors": lambda t: t[:-1]}, r"down_factors is \[5, 1\], not \[6, 1\] of nvfp4"),
]


@pytest.mark.parametrize(("layout", "attributes", "tensors", "says"), REFUSED, ids=[r[3] for r in REFUSED])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_weights_that_are_not_of_their_format_are_refused(layout, attributes, tensors, says, device):
    whole = example(EVERY[layout])
    whole |= {n: change(whole[n]) for n, change in tensors.items()}
    arguments = dict.fromkeys(OPTIONAL) | {n: t.to(device) for n, t in whole.items() if t is not None}
    with pytest.raises(ValueError, match=f"MoeExperts:? {says}"):
        moe_experts(**arguments, **{**EVERY[layout].attributes, **attributes})


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("top_k", [1, 3])
def test_scaled_inputs_equal_llama4(tokens, top_k):
    layout = LAYOUTS["llama4"]
    tensors = example(layout, tokens, sizes=(E, top_k, C, I))
    config = SimpleNamespace(
        num_local_experts=E, num_experts_per_tok=top_k, hidden_size=C, intermediate_size=I, hidden_act="silu"
    )
    module = Llama4TextMoe(config).requires_grad_(False)
    module.experts.gate_up_proj.copy_(tensors["gate_up"])
    module.experts.down_proj.copy_(tensors["down"])
    module.router.weight.copy_(torch.randn(E, C, generator=torch.Generator().manual_seed(0)))
    module.shared_expert.down_proj.weight.zero_()
    expected, logits = module(tensors["x"])
    best = logits.reshape(*tokens, E).topk(top_k)
    tensors |= {"weights": best.values.sigmoid(), "experts": best.indices.int()}
    assert excess(expected.reshape(tensors["x"].shape), layout(tensors)) <= 1


def onnx_runtime(op: str, feeds: dict[str, Tensor], **attributes: object) -> Tensor:
    """MoE or QMoE of com.microsoft, which also routes: by the softmax of the chosen logits."""
    kinds = {torch.float32: 1, torch.uint8: 2}
    inputs = [make_tensor_value_info(n, kinds[t.dtype], t.shape) for n, t in feeds.items()]
    attributes = {"k": K, "activation_type": "swiglu", "swiglu_fusion": 1, "normalize_routing_weights": 1} | attributes
    attributes |= {"activation_alpha": ALPHA, "activation_beta": 1.0, "swiglu_limit": LIMIT}
    node = make_node(op, list(feeds), ["y"], domain="com.microsoft", **attributes)
    graph = make_graph([node], "one", inputs, [make_tensor_value_info("y", 1, feeds["x"].shape)])
    opsets = [make_opsetid("", 23), make_opsetid("com.microsoft", 1)]
    model = make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {n: t.numpy() for n, t in feeds.items()})[0])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    tokens=st.tuples(st.integers(1, 2), st.integers(1, 130)),
    experts=st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))),
    widths=st.tuples(st.integers(1, 64), st.integers(1, 64)),
)
@example_of(tokens=(1, 130), experts=(E, K), widths=(C, I))
def test_equals_moe_of_onnx_runtime_at_any_size(tokens, experts, widths):
    layout = Layout("swiglu_clamped", interleaved=True, bias=True)
    tensors = example(layout, tokens, sizes=(*experts, *widths))
    logits = torch.randn(*tokens, experts[0], generator=torch.Generator().manual_seed(1))
    chosen = logits.topk(experts[1])
    feeds = {"x": tensors["x"].flatten(0, 1), "logits": logits.flatten(0, 1)}
    feeds |= {n: tensors[n] for n in ("gate_up", "gate_up_bias", "down", "down_bias")}
    expected = onnx_runtime("MoE", feeds, k=experts[1]).reshape(tensors["x"].shape)
    tensors |= {"weights": chosen.values.softmax(-1), "experts": chosen.indices.int()}
    assert excess(expected, layout(tensors)) <= 1


@pytest.mark.parametrize("tokens", TOKENS)
def test_mxfp4_equals_qmoe_of_onnx_runtime_where_its_values_are_integers(tokens):
    # QMoE's 4 bits are integers, 8 more than they mean: twice the values up to 3 fit.
    layout = LAYOUTS["mxfp4"]
    tensors = example(layout, tokens)
    whole = torch.tensor([code for code, value in enumerate(VALUES) if abs(value) <= 3])
    logits = torch.randn(*tokens, E, generator=torch.Generator().manual_seed(1))
    chosen = logits.topk(K)
    feeds = {"x": tensors["x"].flatten(0, 1), "logits": logits.flatten(0, 1)}
    for name in ("gate_up", "down"):
        codes = whole[torch.stack((tensors[name] & 15, tensors[name] >> 4)).int() % len(whole)]
        tensors[name] = (codes[0] | codes[1] << 4).to(torch.uint8)
        integers = (torch.tensor(VALUES)[codes] * 2 + 8).int()
        feeds[name] = (integers[0] | integers[1] << 4).to(torch.uint8)
        feeds[f"{name}_scales"] = 2.0 ** (tensors[f"{name}_scales"].float() - 128)
        feeds[f"{name}_bias"] = tensors[f"{name}_bias"]
    expected = onnx_runtime("QMoE", feeds, expert_weight_bits=4, block_size=32).reshape(tensors["x"].shape)
    tensors |= {"weights": chosen.values.softmax(-1), "experts": chosen.indices.int()}
    assert excess(expected, layout(tensors)) <= 1


@pytest.mark.parametrize("layout", [n for n in LAYOUTS if n != "mxfp4"])
def test_weights_kept_in_bf16_count_as_those_numbers_in_fp32(layout):
    tensors = example(LAYOUTS[layout], stored=torch.bfloat16)
    wide = {n: t.float() if n in ("gate_up", "down") else t for n, t in tensors.items()}
    assert torch.equal(LAYOUTS[layout](tensors), LAYOUTS[layout](wide))


@layouts
def test_no_expert_is_computed_that_no_token_chose(layout):
    tensors = example(layout, experts=torch.tensor([0, 4, 5]).expand(1, 7, 3))
    expected = layout(tensors)
    poison = {torch.uint8: 255, torch.float32: torch.nan}
    for name in tensors.keys() - {"x", "weights", "experts"}:
        tensors[name][1:4] = poison[tensors[name].dtype]
    assert torch.equal(layout(tensors), expected)


def flops(tensors: dict[str, Tensor]) -> int:
    absent = dict.fromkeys(OPTIONAL)
    with FlopCounterMode(display=False) as counter:
        moe_experts.reference(**{**absent, **tensors}, **LAYOUTS["qwen"].attributes)
    return counter.get_total_flops()


def test_every_token_costs_its_own_experts_and_no_more():
    assert flops(example(LAYOUTS["qwen"], (1, 1))) == K * 3 * 2 * C * I
    assert flops(example(LAYOUTS["qwen"], (2, 65))) == 130 * K * 3 * 2 * C * I


CHOICES = {
    "one expert has all tokens": torch.full((1, 7, 1), 4),
    "all experts have all tokens": torch.arange(E).expand(1, 7, E),
    "a token has one expert twice": torch.tensor([[[2, 2, 5], [5, 5, 5]]]),
}


@layouts
@pytest.mark.parametrize("experts", CHOICES.values(), ids=CHOICES)
def test_any_choice_is_the_definition_in_float64(experts, layout):
    tensors = example(layout, experts.shape[:2], experts=experts, sizes=(E, experts.shape[-1], C, I))
    assert excess(exact(layout, tensors), layout(tensors)) <= 1


def test_sums_in_fp32():
    # In fp16, 2048 + 1 is 2048: one by one, the ones would be lost.
    layout = Layout(bias=True)
    tensors = example(layout, (1, 1), torch.float16, experts=torch.arange(3).reshape(1, 1, 3))
    tensors["down"].zero_()
    tensors["weights"].fill_(1.0)
    tensors["down_bias"][:3] = torch.tensor([[2048.0], [1.0], [1.0]])
    assert layout(tensors).unique().tolist() == [2050.0]


def test_scaled_inputs_leave_the_outputs_as_they_are():
    layout = Layout(scale_input=True, bias=True)
    tensors = example(layout, (1, 1), experts=torch.tensor([[[3]]]), sizes=(E, 1, C, I))
    tensors["down"].zero_()
    tensors["weights"].fill_(0.25)
    assert torch.equal(layout(tensors)[0, 0], tensors["down_bias"][3])


def test_the_fake_is_laid_out_as_the_result_whatever_the_input():
    tensors = example(LAYOUTS["qwen"])
    tensors["x"] = tensors["x"].mT.contiguous().mT
    absent = dict.fromkeys(OPTIONAL)
    arguments = {**absent, **tensors, **LAYOUTS["qwen"].attributes}
    torch.library.opcheck(moe_experts.call, (), arguments, test_utils=("test_faketensor",))


def test_an_unknown_activation_is_refused():
    layout = Layout("relu")
    with pytest.raises(ValueError, match="'relu'"):
        layout(example(layout))
