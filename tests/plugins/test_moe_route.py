"""MoeRoute against transformers' routers and float64, and its body in ONNX Runtime and TensorRT-RTX."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_node import rtx_build, session
from op_model import DYNAMIC, node_model, run
from torch import Tensor
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeTopKRouter

from llmexport.plugins.moe_route import moe_route
from llmexport.validate.compare import compare
from llmexport.validate.tolerance import Tolerance

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FP32 = float(np.finfo(np.float32).eps)
# exp, the sum of up to 256 of them, a quotient or two: some roundings of the largest weight.
FEW_ROUNDINGS = Tolerance(16 * FP32, 8 * FP32, scaled=True)


@dataclass(frozen=True)
class Routing:
    top_k: int
    scoring: str
    renormalise: bool = False
    scale: float = 1.0
    groups: int = 1
    groups_kept: int = 1
    group_best: int = 2

    def __call__(self, logits: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return moe_route(logits, bias, **asdict(self))


MIXTRAL = Routing(2, "softmax", renormalise=True)
QWEN = Routing(8, "softmax", renormalise=True)
GPT_OSS = Routing(4, "softmax_top_k")
LLAMA4 = Routing(1, "sigmoid")
DEEPSEEK_V2 = Routing(6, "softmax", scale=16.0, groups=8, groups_kept=3, group_best=1)
DEEPSEEK = Routing(8, "sigmoid", renormalise=True, scale=2.5, groups=8, groups_kept=4)
# (experts, routing, with a bias): those of published models, and what none of them combines.
CASES = [
    (4, Routing(4, "softmax", scale=0.5), False),
    (8, MIXTRAL, False),
    (16, LLAMA4, False),
    (16, Routing(3, "softmax", groups=4, groups_kept=2), True),
    (32, GPT_OSS, False),
    (32, Routing(5, "softmax_top_k", groups=4, groups_kept=1, scale=3.0), True),
    (128, LLAMA4, False),
    (128, Routing(6, "sigmoid", renormalise=True), True),
    (160, DEEPSEEK_V2, False),
    (256, QWEN, False),
    (256, DEEPSEEK, True),
    (256, Routing(10, "softmax_top_k", renormalise=True), False),
]


def case_name(value: object) -> str | None:
    return f"{value.scoring}-{value.top_k}" if isinstance(value, Routing) else None


cases = pytest.mark.parametrize(("experts", "routing", "biased"), CASES, ids=case_name)


def example(shape: tuple[int, int], experts: int, biased: bool) -> dict[str, Tensor]:
    """Logits on a grid that every dtype holds, each once in a token; biases that change the choice."""
    seed = torch.Generator().manual_seed(sum(shape) + experts)
    order = torch.rand(*shape, experts, generator=seed).argsort(-1)
    tensors = {"logits": (order - experts // 2) / 16}
    return tensors | ({"bias": torch.randn(experts, generator=seed) / 4} if biased else {})


def exact(logits: np.ndarray, bias: np.ndarray | None, routing: Routing) -> tuple[np.ndarray, np.ndarray]:
    """Weights and experts of one token by the definition, in float64 and lists."""
    exps = np.exp(logits - logits.max())
    scores = {"softmax": exps / exps.sum(), "sigmoid": 1 / (1 + np.exp(-logits)), "softmax_top_k": logits}
    score = scores[routing.scoring]
    choice = list(logits if bias is None else score + bias)
    members = np.split(np.arange(len(choice)), routing.groups)
    sums = [sum(sorted((choice[e] for e in group), reverse=True)[: routing.group_best]) for group in members]
    kept = sorted(range(routing.groups), key=lambda g: (-sums[g], g))[: routing.groups_kept]
    eligible = [e for g in kept for e in members[g]] if routing.groups > 1 else range(len(choice))
    experts = sorted(eligible, key=lambda e: (-choice[e], e))[: routing.top_k]
    weights = score[experts]
    if routing.scoring == "softmax_top_k":
        weights = np.exp(weights - weights.max()) / np.exp(weights - weights.max()).sum()
    if routing.renormalise:
        weights = weights / weights.sum()
    return weights * routing.scale, np.array(experts)


@cases
@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (1, 130)])
def test_is_the_definition_in_float64(shape, experts, routing, biased):
    tensors = example(shape, experts, biased)
    weights, chosen = routing(**tensors)
    bias = tensors["bias"].double().numpy() if biased else None
    rows = [exact(row, bias, routing) for row in tensors["logits"].double().numpy().reshape(-1, experts)]
    assert chosen.reshape(-1, routing.top_k).tolist() == [r[1].tolist() for r in rows]
    expected = np.stack([r[0] for r in rows]).reshape(weights.shape)
    assert compare(expected, weights.numpy()).excess(FEW_ROUNDINGS) <= 1


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_is_the_definition_at_any_size(data):
    groups = data.draw(st.sampled_from([1, 2, 3, 5]))
    experts = groups * data.draw(st.integers(2, 12))
    kept = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, experts // groups * kept))
    scoring = data.draw(st.sampled_from(["softmax", "sigmoid", "softmax_top_k"]))
    routing = Routing(top_k, scoring, data.draw(st.booleans()), 1.5, groups, kept)
    tensors = example((1, data.draw(st.integers(1, 5))), experts, data.draw(st.booleans()))
    weights, chosen = routing(**tensors)
    bias = tensors["bias"].double().numpy() if "bias" in tensors else None
    for row, w, e in zip(tensors["logits"][0].double().numpy(), weights[0].numpy(), chosen[0], strict=True):
        expected = exact(row, bias, routing)
        assert e.tolist() == expected[1].tolist()
        assert compare(expected[0], w).excess(FEW_ROUNDINGS) <= 1


def published(router: type[torch.nn.Module], experts: int, dtype: torch.dtype, **config: object) -> torch.nn.Module:
    """A router of transformers whose logits are its input."""
    known = {"num_experts": experts, "num_local_experts": experts, "hidden_size": experts}
    made = router(SimpleNamespace(**known, **config)).to(dtype)
    with torch.no_grad():
        made.weight.copy_(torch.eye(experts))
    return made.requires_grad_(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("router", "experts", "routing"),
    [(Qwen3_5MoeTopKRouter, 256, QWEN), (MixtralTopKRouter, 8, MIXTRAL), (GptOssTopKRouter, 32, GPT_OSS)],
)
def test_equals_the_router_of_transformers(router, experts, routing, dtype):
    logits = example((1, 130), experts, False)["logits"].to(dtype)
    module = published(router, experts, dtype, num_experts_per_tok=routing.top_k)
    given_back, weights, chosen = module(logits[0])
    assert torch.equal(given_back, logits[0])
    found, picked = routing(logits)
    assert torch.equal(picked[0], chosen.int())
    # Mixtral leaves its weights in fp32.
    difference = compare(weights.to(dtype).double().numpy(), found[0].double().numpy())
    roundoff = float(torch.finfo(dtype).eps)
    assert difference.excess(Tolerance(max(roundoff, 4 * FP32), max(roundoff, 4 * FP32), scaled=True)) <= 1


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_llama4_whose_scores_are_zero_elsewhere(dtype, top_k):
    logits = example((1, 130), 16, False)["logits"].to(dtype)
    scores, _ = published(Llama4Router, 16, dtype, num_experts_per_tok=top_k)(logits[0])
    weights, chosen = Routing(top_k, "sigmoid")(logits)
    assert torch.equal(torch.zeros_like(scores).scatter(-1, chosen[0].long(), weights[0]), scores)


@pytest.mark.parametrize("renormalise", [False, True])
def test_equals_deepseek_with_groups_a_bias_and_a_scale(renormalise):
    tensors = example((1, 130), 256, True)
    config = {"routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4, "norm_topk_prob": renormalise}
    module = published(DeepseekV3TopkRouter, 256, torch.float32, num_experts_per_tok=8, **config)
    module.e_score_correction_bias.copy_(tensors["bias"])
    _, weights, chosen = module(tensors["logits"][0])
    # Theirs are in no order.
    order = chosen.sort(-1).indices
    found, picked = Routing(8, "sigmoid", renormalise, 2.5, 8, 4)(**tensors)
    ours = picked[0].sort(-1).indices
    assert torch.equal(picked[0].gather(-1, ours), chosen.gather(-1, order).int())
    expected, sorted_found = weights.gather(-1, order).numpy(), found[0].gather(-1, ours).numpy()
    assert compare(expected, sorted_found).excess(FEW_ROUNDINGS) <= 1


def test_equals_deepseek_v2_whose_groups_are_as_good_as_their_best_expert():
    tensors = example((1, 130), 160, False)
    config = {"routed_scaling_factor": 16.0, "n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy"}
    module = published(DeepseekV2TopkRouter, 160, torch.float32, num_experts_per_tok=6, **config)
    _, weights, chosen = module(tensors["logits"][0])
    best = weights.sort(-1, descending=True)
    found, picked = DEEPSEEK_V2(**tensors)
    assert torch.equal(picked[0], chosen.gather(-1, best.indices).int())
    assert compare(best.values.numpy(), found[0].numpy()).excess(FEW_ROUNDINGS) <= 1
    # By the sum of two others would be chosen.
    assert not torch.equal(picked, replace(DEEPSEEK_V2, group_best=2)(**tensors)[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_computed_in_fp32_and_rounded_once(dtype):
    logits = example((1, 7), 32, False)["logits"].to(dtype)
    weights, _ = QWEN(logits)
    assert weights.dtype == dtype
    assert torch.equal(weights, QWEN(logits.float())[0].to(dtype))


def ties(experts: int) -> Tensor:
    """Tokens whose logits have one, two, three or about eight values, and one with no number but -inf."""
    seed = torch.Generator().manual_seed(experts)
    values = [torch.randint(0, n, (1, 16, experts), generator=seed) for n in (1, 2, 3, 8)]
    return torch.cat([*(v.float() for v in values), torch.full((1, 1, experts), -torch.inf)], 1)


def lowest_first(logits: Tensor, top_k: int) -> list[list[int]]:
    return [sorted(range(len(row)), key=lambda e: (-row[e], e))[:top_k] for row in logits[0].tolist()]


@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (16, 16), (32, 4), (128, 8), (256, 8), (256, 100)])
def test_the_lower_expert_wins_a_tie_in_torch_and_in_onnx_runtime(experts, top_k):
    logits, routing = ties(experts), Routing(top_k, "sigmoid")
    expected = lowest_first(logits, top_k)
    assert routing(logits)[1][0].tolist() == expected
    model = node_model("MoeRoute", asdict(routing), {"logits": logits})
    runtime = session(model)
    assert run(runtime, {"logits": logits})[1][0].tolist() == expected
    # One row may be sorted in another way than many.
    rows = [run(runtime, {"logits": logits[:, t : t + 1]})[1][0, 0].tolist() for t in range(logits.shape[1])]
    assert rows == expected


def test_the_lower_group_wins_a_tie_in_torch_and_in_onnx_runtime():
    logits, routing = torch.zeros(1, 1, 32), Routing(6, "softmax", groups=8, groups_kept=2)
    logits[..., 12:14] = logits[..., 20:22] = logits[..., 28:30] = 1.0  # groups 3, 5 and 7
    wanted = [12, 13, 20, 21, 14, 15]
    assert routing(logits)[1].tolist() == [[wanted]]
    model = node_model("MoeRoute", asdict(routing), {"logits": logits})
    assert run(session(model), {"logits": logits})[1].tolist() == [[wanted]]


def test_weights_that_are_all_zero_stay_so_in_torch_and_in_onnx_runtime():
    logits, routing = torch.full((1, 1, 8), -200.0), Routing(2, "sigmoid", renormalise=True)
    assert routing(logits)[0].tolist() == [[[0.0, 0.0]]]
    model = node_model("MoeRoute", asdict(routing), {"logits": logits})
    assert run(session(model), {"logits": logits})[0].tolist() == [[[0.0, 0.0]]]


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_body_in_onnx_runtime_equals_the_reference(dtype, experts, routing, biased):
    tensors = {n: t.to(dtype) for n, t in example((1, 1), experts, biased).items()}
    found = session(node_model("MoeRoute", asdict(routing), tensors))
    # An fp16 weight may round to its next number.
    ulp = float(torch.finfo(dtype).eps) if dtype == torch.float16 else 0.0
    bound = Tolerance(FEW_ROUNDINGS.max_abs + ulp, FEW_ROUNDINGS.rms_ratio + ulp, scaled=True)
    for shape in ((1, 1), (2, 7), (1, 130)):
        tensors = {n: t.to(dtype) for n, t in example(shape, experts, biased).items()}
        expected, chosen = routing(**tensors)
        weights, picked = run(found, tensors)
        assert (weights.dtype, picked.dtype) == (expected.numpy().dtype, np.int32)
        assert picked.tolist() == chosen.tolist()
        assert compare(expected.numpy(), weights).excess(bound) <= 1


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="pip install tensorrt-rtx")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("experts", "routing", "biased"), [CASES[i] for i in (0, 3, 4, 9, 10)], ids=case_name)
@pytest.mark.engine
def test_rtx_builds_the_body(experts, routing, biased, dtype, tmp_path: Path):
    tensors = {n: t.to(dtype) for n, t in example((1, 1), experts, biased).items()}
    model = node_model("MoeRoute", asdict(routing), tensors, {"bias"} & tensors.keys())
    assert rtx_build(model, DYNAMIC, tmp_path) == ["built"]


def test_an_unknown_scoring_is_refused():
    tensors, routing = example((1, 1), 4, False), Routing(2, "tanh")
    with pytest.raises(ValueError, match="'tanh'"):
        routing(**tensors)
    with pytest.raises(ValueError, match="'tanh'"):
        node_model("MoeRoute", asdict(routing), tensors)
