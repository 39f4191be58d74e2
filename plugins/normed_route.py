"""Plugins that norm what a router reads, multiply by its weights, and route: AddRmsNorm, products and MoeRoute.

    y, sum = AddRmsNorm(x, residual, norm_weight)
    weights, experts = MoeRoute(y @ router_weight.T + router_bias, bias), or a plugin of shared_route.py

Logits are rounded once to the type of y, with router_bias [E], which is zeros where the router has none; `wide` leaves
them in fp32, as a router of fp32 has them. weights [B, T, K] are rounded once, to the type of y. A shared expert's gate
is y @ gate_weight[0], rounded likewise. `bias` [E], of the choice, is fp32. normed_moe_route/ has the plugins. Torch is
imported by `normed_routes` alone.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from llmexport.plugins.shared_route import GATE, LOGITS, ROUTE, SHARED_ROUTES, shared_ops
from llmexport.plugins.spec import Op, all_ops

if TYPE_CHECKING:
    from torch import Tensor

NORM, BIAS, GATE_WEIGHT, WIDE = "AddRmsNorm", "bias", "gate_weight", "wide"
# By plugin, the one that routes what it has made logits of.
NORMED_ROUTES: dict[str, str] = {f"Normed{route}": route for route in (ROUTE, *SHARED_ROUTES)}


def inputs_of(name: str) -> list[str]:
    """The names of a plugin's inputs; the last one may be left out."""
    gates = [GATE_WEIGHT] if SHARED_ROUTES.get(NORMED_ROUTES[name]) else []
    return ["x", "residual", "norm_weight", "router_weight", "router_bias", *gates, BIAS]


def normed_routes() -> dict[str, Op]:
    """The plugins as ops, by name, with their references."""
    ops = all_ops() | shared_ops()
    return {name: _op(name, ops[NORM], ops[route]) for name, route in NORMED_ROUTES.items()}


def _op(name: str, norm: Op, route: Op) -> Op:
    row, every = norm.inputs["x"], norm.inputs["weight"]
    dims = {"x": row, "residual": row, "norm_weight": every, "router_weight": ("E", "C"), "router_bias": ("E",)}
    dims |= {GATE_WEIGHT: ("L", "C"), BIAS: ("E",)}
    attributes = {**route.attributes, **norm.attributes, WIDE: bool}

    def reference(
        x: Tensor,
        residual: Tensor,
        norm_weight: Tensor,
        router_weight: Tensor,
        router_bias: Tensor,
        gate_weight: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        wide: bool,
        **said: Any,
    ) -> tuple[Tensor, ...]:
        from torch.nn.functional import linear

        y, total = norm.reference(x, residual, norm_weight, None, **{n: said.pop(n) for n in norm.attributes})
        read = y.float() if wide else y
        given = {LOGITS: linear(read, router_weight.to(read.dtype), router_bias.to(read.dtype)), BIAS: bias}
        if gate_weight is not None:
            given[GATE] = linear(read, gate_weight.to(read.dtype))
        weights, experts = route.reference(**given, **said)
        return y, total, weights.to(y.dtype), experts

    return dataclasses.replace(
        route,
        name=name,
        version=1,
        reference=reference,
        inputs={n: dims[n] for n in inputs_of(name)},
        outputs=norm.outputs | route.outputs,
        types={**dict.fromkeys((*inputs_of(name), *norm.outputs, "weights"), "T"), BIAS: "float32", "experts": "int32"},
        attributes=attributes,
        joins=(),
        optional=(BIAS,),
        body=None,
        call=reference,
    )
