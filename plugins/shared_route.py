"""Plugins that route each token to what MoeRoute chooses for it, and behind that to shared experts.

    weights, experts = MoeRoute(...), and E, E + 1, ... of weight 1 or sigmoid(shared_gate)

`slots` are the experts of a token, MoeRoute's top_k and the shared ones. A plugin's inputs are MoeRoute's, with
`shared_gate` [B, T, 1] behind the logits if there is one, and its attributes MoeRoute's and `slots`. Weights are
computed in fp32 and rounded once, a sigmoid too. moe_route/ has the plugins. Torch is imported by `shared_ops` alone.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from llmexport.plugins.declared import Declared, declared
from llmexport.plugins.spec import Op, all_ops

if TYPE_CHECKING:
    from torch import Tensor

ROUTE, LOGITS, GATE, SLOTS = "MoeRoute", "logits", "shared_gate", "slots"
# What each plugin reads beside MoeRoute's inputs.
SHARED_ROUTES: dict[str, tuple[str, ...]] = {"SharedMoeRoute": (), "GatedSharedMoeRoute": (GATE,)}
MOST_EXPERTS = 520  # that MoeExperts' kernels sort, shared ones among them: kMoeMaxExperts


def declared_routes() -> tuple[Declared, ...]:
    """What the plugins would say as ops, without torch."""
    route = next(op for op in declared() if op.name == ROUTE)
    return tuple(
        dataclasses.replace(
            route,
            name=name,
            version=1,
            inputs=_inputs(route.inputs, gates),
            attributes={**route.attributes, SLOTS: "int"},
            joins=(*route.joins, *gates),
        )
        for name, gates in SHARED_ROUTES.items()
    )


def shared_ops() -> dict[str, Op]:
    """The plugins as ops, by name, with their references."""
    route = all_ops()[ROUTE]

    def reference(
        logits: Tensor, bias: Tensor | None, *, slots: int, shared_gate: Tensor | None = None, **said: Any
    ) -> tuple[Tensor, Tensor]:
        import torch

        weights, experts = route.reference(logits, bias, **said)
        tokens, count = logits.shape[:-1], slots - said["top_k"]
        own = torch.ones(1) if shared_gate is None else shared_gate.float().sigmoid()
        first = logits.shape[-1]
        shared = torch.arange(first, first + count, dtype=torch.int32)
        more = (own.to(weights.dtype).expand(*tokens, count), shared.expand(*tokens, count))
        return torch.cat((weights, more[0]), -1), torch.cat((experts, more[1]), -1)

    return {
        name: dataclasses.replace(
            route,
            name=name,
            version=1,
            reference=reference,
            inputs=_inputs(route.inputs, gates),
            types={**route.types, **dict.fromkeys(gates, "T")},
            attributes={**route.attributes, SLOTS: int},
            sizes={SLOTS: "K"},
            joins=(*route.joins, *gates),
            body=None,
            call=reference,
        )
        for name, gates in SHARED_ROUTES.items()
    }


def _inputs(own: dict[str, tuple[str, ...]], gates: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    behind = {n: dims for n, dims in own.items() if n != LOGITS}
    return {LOGITS: own[LOGITS], **dict.fromkeys(gates, ("B", "T", "L")), **behind}
