"""The mixture of experts: router, routed experts, shared expert."""

import torch
from torch import Tensor, nn

from llmexport.export import spec
from llmexport.export.blocks.linear import times
from llmexport.export.blocks.mlp import Mlp
from llmexport.export.blocks.norm import Norm
from llmexport.plugins.microscaling import BLOCK
from llmexport.plugins.moe_experts import moe_experts
from llmexport.plugins.moe_route import moe_route


class Router(nn.Linear):
    def __init__(self, block: spec.Router) -> None:
        super().__init__(block.hidden, block.experts, bias=block.bias)
        self.block = block
        self.correction = nn.Parameter(torch.empty(block.experts)) if block.correction else None
        self.norm = Norm(block.norm) if block.norm else None
        self.expert_scale = nn.Parameter(torch.empty(block.experts)) if block.expert_scale else None

    def forward(self, normed: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        block = self.block
        normed = self.norm(normed) if self.norm else normed
        read = times(normed, block.input_scale)
        weights, experts = self._route(super().forward(read.float() if block.wide else read))
        if self.expert_scale is not None:
            scales = self.expert_scale.index_select(0, experts.flatten()).view_as(weights)
            weights = (weights.float() * scales.float()).to(weights.dtype)
        return weights.to(normed.dtype), experts

    def _route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        block = self.block
        if block.scoring == "sparse_mixer":
            return sparse_mixer(logits, block.jitter)
        how = (block.scoring, block.renormalise, block.scale)
        groups = (block.groups, block.groups_kept, block.group_best)
        return moe_route(logits, self.correction, block.top_k, *how, *groups)


def sparse_mixer(logits: Tensor, jitter: float) -> tuple[Tensor, Tensor]:
    """The best expert of every token and the best of the others, without sampling (arXiv 2409.12136).

    logits [B, T, E]; weights [B, T, 2] fp32 and experts [B, T, 2] int32, the lower index winning a tie. An expert's
    weight is its share in a softmax over those that are left and within 2 * `jitter` of it, by the larger of its logit
    and their own magnitude.
    """
    wide = logits.float()
    left, weights, experts = wide, [], []
    for _ in range(2):
        best, expert = left.max(-1, keepdim=True)
        far = (best - wide) / torch.maximum(wide.abs(), best) > 2 * jitter
        weights.append(left.masked_fill(far, -torch.inf).softmax(-1).gather(-1, expert))
        experts.append(expert)
        left = left.scatter(-1, expert, -torch.inf)
    return torch.cat(weights, -1), torch.cat(experts, -1).to(torch.int32)


class Experts(nn.Module):
    def __init__(self, block: spec.Experts) -> None:
        super().__init__()
        self.block = block
        for name, held in block.matrices.items():
            for s in held:
                dtype = torch.float32 if s.dtype in spec.ANY_FLOAT else getattr(torch, s.dtype)
                self._add(name + s.suffix, s.shape, dtype)
            if block.bias:
                self._add(f"{name}_bias", (block.experts, block.sizes[name][0]))

    def forward(self, normed: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        block, own = self.block, dict(self.named_parameters())
        values, *others = zip(*([own[n + s.suffix] for s in held] for n, held in block.matrices.items()), strict=True)
        return moe_experts(
            normed,
            weights,
            experts,
            *values,
            *(own.get(f"{n}_bias") for n in block.matrices),
            # Scales, or nothing.
            *(tensor for pair in others or [(None, None)] for tensor in pair),
            # Neither factors nor zero points.
            *[None] * 4,
            block.activation,
            block.alpha,
            block.limit,
            block.transposed,
            block.interleaved,
            block.scale_input,
            *(("mxfp4", BLOCK) if others else ("plain", 0)),
        )

    def _add(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
        self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False))


class SharedExpert(Mlp):
    def __init__(self, block: spec.SharedExpert) -> None:
        super().__init__(block.mlp)
        self.gate = nn.Linear(block.mlp.hidden, 1, bias=False) if block.gated else None

    def forward(self, normed: Tensor) -> Tensor:
        mixed = super().forward(normed)
        return mixed if self.gate is None else torch.sigmoid(self.gate(normed)) * mixed


class Moe(nn.Module):
    def __init__(self, block: spec.Moe) -> None:
        super().__init__()
        self.router = Router(block.router)
        self.experts = Experts(block.experts)
        self.shared_expert = SharedExpert(block.shared) if block.shared else None

    def forward(self, normed: Tensor) -> Tensor:
        mixed = self.experts(normed, *self.router(normed))
        return mixed if self.shared_expert is None else mixed + self.shared_expert(normed)


class MlpWithExperts(nn.Module):
    def __init__(self, block: spec.MlpWithExperts) -> None:
        super().__init__()
        self.mlp = Mlp(block.mlp)
        self.router = Router(block.router)
        self.experts = Experts(block.experts)
        self.mlp_input_norm, self.mlp_output_norm = Norm(block.norm), Norm(block.norm)
        self.experts_input_norm, self.experts_output_norm = Norm(block.norm), Norm(block.norm)

    def forward(self, hidden: Tensor) -> Tensor:
        dense = self.mlp_output_norm(self.mlp(self.mlp_input_norm(hidden)))
        mixed = self.experts(self.experts_input_norm(hidden), *self.router(hidden))
        return dense + self.experts_output_norm(mixed)
