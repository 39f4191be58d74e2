"""MoeRoute: the experts that a token goes to, and their weights."""

import torch
from torch import Tensor

from llmexport.plugins.moe_route.body import body
from llmexport.plugins.spec import op


def fake(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    scoring: str,
    renormalise: bool,
    scale: float,
    groups: int,
    groups_kept: int,
    group_best: int,
) -> tuple[Tensor, Tensor]:
    shape = (*logits.shape[:-1], top_k)
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int32)


@op(
    "MoeRoute",
    version=1,
    dims={"logits": "B T E", "bias": "E", "top_k": "K"},
    outputs={"weights": "B T K", "experts": "B T K"},
    static=("E",),
    types={"experts": "int32"},
    choices={"scoring": ("softmax", "softmax_top_k", "sigmoid")},
    joins=("logits",),
    body=body,
    fake=fake,
)
def moe_route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    scoring: str,
    renormalise: bool,
    scale: float,
    groups: int,
    groups_kept: int,
    group_best: int,
) -> tuple[Tensor, Tensor]:
    """The top_k experts of every token and their weights, computed in fp32 and rounded once.

    logits [B, T, E]; weights [B, T, K] in their dtype and experts [B, T, K] int32, best first, the lower index winning
    a tie. scoring says how a weight is made:
      "softmax"        a softmax over all logits (modeling_mixtral.py, modeling_qwen3_5_moe.py)
      "softmax_top_k"  a softmax over the chosen logits alone (modeling_gpt_oss.py)
      "sigmoid"        the sigmoid of the logit (modeling_llama4.py, modeling_deepseek_v3.py)
    Experts are chosen by their logits; or, if there is a bias [E], by score + bias, while the weights stay without
    it. groups > 1 splits the experts into that many equal groups, of which only the groups_kept whose group_best best
    choices sum highest are eligible: 1 in modeling_deepseek_v2.py, 2 in modeling_deepseek_v3.py. renormalise divides
    the weights by their sum and DeepSeek's 1e-20, which changes no sum above 2e-13; scale multiplies them last. Raises
    ValueError on any other scoring.
    """
    wide = logits.float()
    if scoring == "softmax":
        scores = torch.softmax(wide, -1)
    elif scoring == "sigmoid":
        scores = torch.sigmoid(wide)
    elif scoring == "softmax_top_k":
        scores = wide
    else:
        raise ValueError(f"MoeRoute knows no scoring {scoring!r}")
    choice = wide if bias is None else scores + bias.float()
    if groups > 1:
        grouped = choice.unflatten(-1, (groups, -1))
        best = grouped.topk(group_best, -1).values.sum(-1)
        kept = best.sort(dim=-1, descending=True, stable=True).indices[..., :groups_kept]
        dropped = torch.ones_like(best, dtype=torch.bool).scatter(-1, kept, False)
        choice = grouped.masked_fill(dropped.unsqueeze(-1), -torch.inf).flatten(-2)
    experts = choice.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    weights = scores.gather(-1, experts)
    if scoring == "softmax_top_k":
        weights = torch.softmax(weights, -1)
    if renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return (weights * scale).to(logits.dtype), experts.to(torch.int32)
