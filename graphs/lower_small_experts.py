"""Gives small experts in float32 to MoE of com.microsoft, which routes tokens as well."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from llmexport.graphs.fusion import Added, Fused, Refusal, float_type, fuse_each, holds, is_output, produced_by
from llmexport.graphs.lower_experts import ACTIVATIONS, HELD
from llmexport.plugins.packed_formats import PLAIN
from llmexport.plugins.spec import DOMAIN

# Numbers of an expert's matrices up to which MoE is faster, as measured (export/README.md): a turn of the body's Scan
# takes some microseconds more, and its products fewer where weights are many.
SMALL = 2**20


def lower_small_experts(graph: gs.Graph) -> Fused:
    """Rewrites every legal MoeExperts of small experts whose rows of gate and up alternate.

                  logits                                logits
                    |                                     |
                 MoeRoute                              Reshape
                 |      |                                 |
         x    weights  experts                    x   [tokens, E]
         |      |      |                          |       |
         MoeExperts ---+- stacks    =>           MoE -----+- stacks
             |                                    |
             y                                    y

    MoE goes by the softmax of all logits, and divides the weights of a token by their sum; of two experts that a token
    likes the same it takes the latter. The router's `scale` multiplies what comes out. Legal if
    1. weights are floats of x's type, float32, and those of an expert at most SMALL,
    2. the activation is SwiGLU, plain or clamped,
    3. MoeRoute makes both weights and choice, of a softmax, for nobody else, without groups or a correction,
    4. the weights are divided by their sum: MoE can leave that out, but gives zeros then where ONNX Runtime lets it
       write over x, which it zeroes before it reads it (1.23 to 1.31),
    5. the routing weight multiplies what comes out.
    """
    return fuse_each(graph, ("MoeExperts",), _lower, where=_is_laid_out)


def _is_laid_out(node: gs.Node) -> bool:
    return node.attrs["format"] == PLAIN and bool(node.attrs["interleaved"]) and not node.attrs["transposed"]


def _lower(graph: gs.Graph, node: gs.Node) -> None:
    (x, shares, chosen), given = node.inputs[:3], dict(zip(HELD, node.inputs[3:], strict=False))
    (experts, width, hidden), activation = given["gate_up"].shape, node.attrs["activation"]
    if any(float_type(v) != "float32" for v in (x, given["gate_up"], given["down"])):
        raise Refusal("it or its weights are not in float32")
    if (numbers := hidden * (width + width // 2)) > SMALL:
        raise Refusal(f"an expert has {numbers} numbers, of which MoE is faster up to {SMALL}")
    if activation not in ACTIVATIONS:
        raise Refusal(f"its activation is {activation}, not {' or '.join(ACTIVATIONS)}")
    if node.attrs["scale_input"]:
        raise Refusal("the routing weight multiplies what goes in")
    route = _router(graph, node, shares, chosen)
    added = Added(node.name)
    shape = added.constant("logits_shape", [-1, experts])
    logits = added.node("Reshape", "logits", [route.inputs[0], shape], np.float32, [f"{node.name}/tokens", experts])
    alpha, beta = ACTIVATIONS[activation]
    said = {
        "k": int(route.attrs["top_k"]),
        "activation_type": "swiglu",
        "activation_alpha": float(node.attrs["alpha"]) if alpha is None else alpha,
        "activation_beta": beta,
        "swiglu_fusion": 1,
        "normalize_routing_weights": 1,
    }
    if activation == "swiglu_clamped":
        said["swiglu_limit"] = float(node.attrs["limit"])
    inputs = [x, logits]
    for name in ("gate_up", "down"):
        bias = given.get(f"{name}_bias")
        inputs += [given[name], gs.Variable.empty() if bias is None or holds(bias, 0) else bias]
    [y], at, scale = list(node.outputs), graph.nodes.index(node), float(route.attrs["scale"])
    node.inputs.clear()
    node.outputs.clear()
    node.op, node.domain, node.attrs = "MoE", "com.microsoft", said
    node.inputs.extend(inputs)
    graph.nodes[at:at] = added.nodes
    if scale == 1:
        node.outputs.append(y)
        return
    whole = gs.Variable(f"{node.name}/unscaled", np.float32, y.shape)
    node.outputs.append(whole)
    factor = added.constant("scale", scale, np.float32)
    graph.nodes.insert(graph.nodes.index(node) + 1, gs.Node("Mul", f"{node.name}/scaled", {}, [whole, factor], [y]))


def _router(graph: gs.Graph, node: gs.Node, shares: gs.Tensor, chosen: gs.Tensor) -> gs.Node:
    """The MoeRoute of a node. Raises Refusal where MoE would route otherwise."""
    route = produced_by(shares, "MoeRoute", DOMAIN)
    if route is None or route.outputs[1] is not chosen:
        raise Refusal("no MoeRoute makes its routing weights and its choice")
    if any(is_output(graph, v) or any(n is not node for n in v.outputs) for v in route.outputs):
        raise Refusal("its routing weights or its choice have other readers")
    if len(route.inputs) > 1 or int(route.attrs["groups"]) > 1 or "softmax" not in route.attrs["scoring"]:
        raise Refusal("its experts are not chosen by a softmax alone")
    if route.attrs["scoring"] == "softmax" and not route.attrs["renormalise"]:
        raise Refusal("its routing weights are not divided by their sum")
    if float_type(route.inputs[0]) != "float32":
        raise Refusal("its logits are not in float32")
    return route
