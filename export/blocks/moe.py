"""The mixture of experts: router, routed experts, shared expert."""

import torch
from torch import Tensor, nn

from llmexport.export import spec
from llmexport.export.blocks.mlp import Mlp
from llmexport.plugins.moe_experts import moe_experts
from llmexport.plugins.moe_route import moe_route


class Router(nn.Linear):
    def __init__(self, block: spec.Router) -> None:
        super().__init__(block.hidden, block.experts, bias=block.bias)
        self.block = block

    def forward(self, normed: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        block = self.block
        return moe_route(super().forward(normed), None, block.top_k, block.scoring, block.renormalise, 1.0, 1, 1)


class Experts(nn.Module):
    def __init__(self, block: spec.Experts) -> None:
        super().__init__()
        self.block = block
        gate_up, down = (2 * block.intermediate, block.hidden), (block.hidden, block.intermediate)
        for name, (rows, columns) in (("gate_up_proj", gate_up), ("down_proj", down)):
            if block.mxfp4:
                self._add(f"{name}_blocks", rows, columns // 2, dtype=torch.uint8)
                self._add(f"{name}_scales", rows, columns // spec.MXFP4_BLOCK, dtype=torch.uint8)
            else:
                self._add(name, *((columns, rows) if block.transposed else (rows, columns)))
            if block.bias:
                self._add(f"{name}_bias", rows)

    def forward(self, normed: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        block, own = self.block, dict(self.named_parameters())
        suffix = "_blocks" if block.mxfp4 else ""
        return moe_experts(
            normed,
            weights,
            experts,
            *(own[f"{n}_proj{suffix}"] for n in ("gate_up", "down")),
            *(own.get(f"{n}_proj_bias") for n in ("gate_up", "down")),
            *(own.get(f"{n}_proj_scales") for n in ("gate_up", "down")),
            block.activation,
            block.alpha,
            block.limit,
            block.transposed,
            block.interleaved,
            block.scale_input,
        )

    def _add(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        tensor = torch.empty(self.block.experts, *shape, dtype=dtype)
        self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


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
