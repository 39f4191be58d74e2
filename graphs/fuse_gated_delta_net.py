"""Fuses a gated delta rule with the convolution and the gates before it, and the gated norm behind it."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from llmexport.graphs.fusion import (
    Fused,
    Refusal,
    float_type,
    fuse_each,
    is_output,
    is_read_before,
    other_input,
    produced_by,
    replace,
    scalar,
    sole_consumer,
)
from llmexport.plugins.spec import DOMAIN

LINEAR_FROM = 20.0  # softplus(x) is x above it


def fuse_gated_delta_net(graph: gs.Graph) -> Fused:
    """Rewrites every legal GatedDeltaRule, and names those that it leaves.

             mixed            a, dt_bias         b
               |                  |              |          mixed conv_weight conv_state end
          CausalConv1d         Softplus       Sigmoid          |  a b present a_log dt_bias z weight state
               |                  |              |              \\  |  |   |      |     |   |   /    /
             Split     -exp(a_log) * present  * present    =>                GatedDeltaNet
            /  |  \\               |              |                    /           |           \\
         Reshape ...              |              |                 gated  next_conv_state  next_state
            \\  |  /               |              |
             q k v                g             beta   state
                 \\                |             /      /
                          GatedDeltaRule
                            /          \\
        z, weight -- GatedRmsNorm    next_state

    Legal if
    1. q, k and v are the parts of one Split of the last axis, reshaped to heads of the sizes that the state has, of
       what a CausalConv1d with SiLU and no bias gives to nothing else,
    2. g is -exp(a_log) softplus(a + dt_bias) in fp32, times present, where softplus(x) may be x above 20,
    3. beta is sigmoid(b), times the same present, and present [B, T] has got its last axis by an Unsqueeze,
    4. GatedRmsNorm alone reads what the rule gives, as what it norms,
    5. mixed, conv_weight, conv_state, a, b, present, a_log, dt_bias, z and the weight are of one float type, and a, b,
       a_log and dt_bias have a number for each head of v,
    6. nothing reads next_conv_state or next_state before the norm.
    """
    return fuse_each(graph, ("GatedDeltaRule",), _fuse)


def _fuse(graph: gs.Graph, rule: gs.Node) -> None:
    q, k, v, g, beta, state = rule.inputs
    y, next_state = rule.outputs
    convolution = _convolution(graph, _split(q, k, v, state))
    a, a_log, dt_bias, shown = _decay(g)
    b = _strength(beta, shown)
    present = _unsqueezed(shown)
    if is_output(graph, y):
        raise Refusal("what the rule gives is a graph output")
    norm = sole_consumer(y, "what the rule gives")
    if norm.op != "GatedRmsNorm" or norm.domain != DOMAIN or norm.inputs[0] is not y:
        raise Refusal(f"what the rule gives goes to {norm.op}, not to a gated norm")
    z, weight = norm.inputs[1:]
    mixed, conv_weight, conv_state, end = convolution.inputs[:4]
    next_conv_state = convolution.outputs[1]
    inputs = [mixed, conv_weight, conv_state, end, a, b, present, a_log, dt_bias, z, weight, state]
    kinds = {float_type(x) for x in inputs[:-1] if x is not end}
    if len(kinds) > 1 or "" in kinds:
        raise Refusal("its inputs are not of one float type")
    if any(list(x.shape or [None])[-1] != state.shape[1] for x in (a, b, a_log, dt_bias)):
        raise Refusal("a, b, a_log and dt_bias have not a number for each head of v")
    for after in (next_conv_state, next_state):
        if is_read_before(graph, norm, after):
            raise Refusal(f"{after.name} is read before the norm")
    attributes = {**rule.attrs, **norm.attrs}
    outputs = [norm.outputs[0], next_conv_state, next_state]
    replace(norm, [convolution, rule], "GatedDeltaNet", inputs, outputs, attributes)


def _split(q: gs.Tensor, k: gs.Tensor, v: gs.Tensor, state: gs.Tensor) -> gs.Tensor:
    """What q, k and v are the parts of."""
    parts = [
        _made(x, "Reshape", f"{n} is no reshaped part of one tensor") for n, x in zip("qkv", (q, k, v), strict=True)
    ]
    split = produced_by(parts[0].inputs[0], "Split")
    if split is None or [n.inputs[0] for n in parts] != list(split.outputs):
        raise Refusal("q, k and v are not the parts of one Split")
    mixed: gs.Tensor = split.inputs[0]
    if len(mixed.shape or ()) != 3 or split.attrs.get("axis", 0) not in (-1, 2):
        raise Refusal("the Split is not of the last of three axes")
    heads = [list(x.shape or ())[2:] for x in (q, k, v)]
    _, value_heads, size, width = [*(state.shape or ()), *[None] * 4][:4]
    known = all(len(h) == 2 and all(isinstance(n, int) for n in h) for h in heads)
    if not known or heads[0] != heads[1] or heads[0][1] != size or heads[2] != [value_heads, width]:
        raise Refusal("the heads of q, k and v are not those of the state")
    return mixed


def _convolution(graph: gs.Graph, convolved: gs.Tensor) -> gs.Node:
    """The CausalConv1d that makes it."""
    made = produced_by(convolved, "CausalConv1d", DOMAIN)
    if made is None or made.attrs["activation"] != "silu" or len(made.inputs) > 4:
        raise Refusal("q, k and v come of no CausalConv1d with SiLU and no bias")
    if len(convolved.outputs) > 1 or is_output(graph, convolved):
        raise Refusal("others read what the convolution gives")
    return made


def _decay(g: gs.Tensor) -> tuple[gs.Tensor, gs.Tensor, gs.Tensor, gs.Tensor]:
    """a, a_log, dt_bias and present, unsqueezed, of g."""
    other = "g is not -exp(a_log) * softplus(a + dt_bias) * present"
    masked = _made(g, "Mul", other)
    product, shown = _made(masked.inputs[0], "Mul", other), _narrow(masked.inputs[1])
    rate = _made(_made(product.inputs[0], "Neg", other).inputs[0], "Exp", other)
    step = _made(_softplus(product.inputs[1], other), "Add", other)
    a, dt_bias = (_narrow(x) for x in step.inputs)
    a_log = _narrow(rate.inputs[0])
    if len(a.shape or ()) != 3 or [len(x.shape or ()) for x in (a_log, dt_bias)] != [1, 1]:
        raise Refusal(other)
    return a, a_log, dt_bias, shown


def _softplus(value: gs.Tensor, other: str) -> gs.Tensor:
    """What `value` is the softplus of."""
    choice = produced_by(value, "Where")
    if choice is None:
        return _made(value, "Softplus", other).inputs[0]
    above, step, curved = choice.inputs
    comparison = _made(above, "Greater", other)
    curve = _made(curved, "Softplus", other)
    if comparison.inputs[0] is not step or scalar(comparison.inputs[1]) != LINEAR_FROM or curve.inputs[0] is not step:
        raise Refusal(other)
    return step


def _strength(beta: gs.Tensor, shown: gs.Tensor) -> gs.Tensor:
    """b of beta."""
    other = "beta is not sigmoid(b) * present"
    masked = _made(beta, "Mul", other)
    if not any(x is shown for x in masked.inputs):
        raise Refusal(other)
    b: gs.Tensor = _made(other_input(masked, shown), "Sigmoid", other).inputs[0]
    return b


def _unsqueezed(shown: gs.Tensor) -> gs.Tensor:
    """present [B, T] of [B, T, 1]."""
    lifted = _made(shown, "Unsqueeze", "present has not got its last axis by an Unsqueeze")
    if scalar(lifted.inputs[1]) not in (-1, 2) or len(lifted.inputs[0].shape or ()) != 2:
        raise Refusal("present has not got its last axis by an Unsqueeze")
    return lifted.inputs[0]


def _made(value: gs.Tensor, op: str, otherwise: str) -> gs.Node:
    node = produced_by(value, op)
    if node is None:
        raise Refusal(otherwise)
    return node


def _narrow(value: gs.Tensor) -> gs.Tensor:
    """The value before a cast to fp32."""
    cast = produced_by(value, "Cast")
    if cast is None or not float_type(cast.inputs[0]) or float_type(value) != "float32":
        return value
    return cast.inputs[0]
