"""Gives experts in int4 to QMoE of com.microsoft, which multiplies with their numbers as they are packed."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from llmexport.graphs.fusion import Added, Fused, Refusal, float_type, fuse_each, holds, producer
from llmexport.plugins.spec import DOMAIN

FORMATS = ("uint4", "uint8", "int8")  # those of integers, of which it is said why they are left
BLOCKS = (128, 64, 32, 16)  # columns that may share a scale there
ACTIVATIONS = {"silu": (1.0, 0.0), "swiglu_clamped": (None, 1.0)}  # its alpha, else the node's own, and its beta
# What is read besides x, routing weights and the experts that these are of.
HELD: tuple[str, ...] = ("gate_up", "down", "gate_up_bias", "down_bias", "gate_up_scales", "down_scales")
HELD += ("gate_up_factors", "down_factors", "gate_up_zeros", "down_zeros")


def lower_experts(graph: gs.Graph) -> Fused:
    """Rewrites every legal MoeExperts of integers, and names those that it leaves.

                  logits                                logits
                    |                                     |
                 MoeRoute                              MoeRoute
                 |      |                              |      |
         x    weights  experts               x      ScatterElements   scales of its blocks, zero points packed
         |      |      |                     |           |            |
         MoeExperts ---+- stacks    =>      QMoE --------+------------+- stacks
             |                               |
             y                               y

    The table [tokens, experts] has the weight of each expert that a token chose, and 0 of others; QMoE takes what is
    largest in a row, leaves out what is at most 1e-8, and neither scales nor rounds it. It multiplies float32 with the
    numbers that the weights mean. Legal if
    1. weights are uint4, rows of gate and up in turn, of sizes that blocks of one size and of 16 to 128 columns fill
       twice or more, and each block lies in one group,
    2. they have no factors but ones,
    3. x is float32,
    4. the activation is SwiGLU, plain or clamped,
    5. the routing weight multiplies what comes out, and is no less than 0: MoeRoute makes it, or a softmax or sigmoid.
    """
    return fuse_each(graph, ("MoeExperts",), _lower, where=lambda n: n.attrs["format"] in FORMATS)


def _lower(graph: gs.Graph, node: gs.Node) -> None:
    (x, shares, chosen), given = node.inputs[:3], dict(zip(HELD, node.inputs[3:], strict=False))
    _check(node, x, shares, given)
    experts, width, hidden = given["gate_up"].shape[0], given["gate_up"].shape[1], given["down"].shape[1]
    columns = {"gate_up": hidden, "down": width // 2}
    block = _block(int(node.attrs["group"]), [*columns.values()])
    alpha, beta = ACTIVATIONS[node.attrs["activation"]]
    added = Added(node.name)
    table = _table(added, shares, chosen, experts)
    scales, zeros, biases = {}, {}, {}
    for name, size in columns.items():
        times = min(int(node.attrs["group"]), size) // block
        rows = given[name].shape[1]
        scales[name] = _of_blocks(added, given[f"{name}_scales"], [experts, rows, size // block], times)
        biases[name] = gs.Variable.empty() if holds(given[f"{name}_bias"], 0) else given[f"{name}_bias"]
        if points := given.get(f"{name}_zeros"):
            own = _of_blocks(added, points, [experts, rows, size // block], times)
            zeros[name] = _packed(added, own, [experts, rows, size // block])
        else:
            zeros[name] = gs.Variable.empty()
    said = {
        "k": shares.shape[-1],
        "activation_type": "swiglu",
        "activation_alpha": float(node.attrs["alpha"]) if alpha is None else alpha,
        "activation_beta": beta,
        "swiglu_fusion": 1,
        "normalize_routing_weights": 0,
        "expert_weight_bits": 4,
        "block_size": block,
    }
    if node.attrs["activation"] == "swiglu_clamped":
        said["swiglu_limit"] = float(node.attrs["limit"])
    absent = [gs.Variable.empty() for _ in range(4)]
    inputs = [x, table]
    inputs += [part[n] if part else given[n] for n in columns for part in (None, scales, biases)]
    # Of a third matrix, and another table to choose by.
    inputs += [*absent[:3], zeros["gate_up"], zeros["down"], absent[3], table]
    outputs, at = list(node.outputs), graph.nodes.index(node)
    node.inputs.clear()
    node.outputs.clear()
    node.op, node.domain, node.attrs = "QMoE", "com.microsoft", said
    node.inputs.extend(inputs)
    node.outputs.extend(outputs)
    graph.nodes[at:at] = added.nodes


def _check(node: gs.Node, x: gs.Tensor, shares: gs.Tensor, given: dict[str, gs.Tensor]) -> None:
    """Raises Refusal on what QMoE does not take, or rounds, or computes otherwise."""
    attributes = node.attrs
    if attributes["format"] != "uint4":
        raise Refusal(f"its weights are {attributes['format']}: QMoE rounds what it multiplies with those to 8 bits")
    if float_type(x) != "float32":
        raise Refusal(f"it computes in {float_type(x)}, not in float32")
    if attributes["activation"] not in ACTIVATIONS:
        raise Refusal(f"its activation is {attributes['activation']}, not {' or '.join(ACTIVATIONS)}")
    if not attributes["interleaved"]:
        raise Refusal("its rows of gate and up do not alternate")
    if attributes["scale_input"]:
        raise Refusal("the routing weight multiplies what goes in")
    if not all(holds(given[n], 1) for n in ("gate_up_factors", "down_factors") if n in given):
        raise Refusal("its weights have factors")
    if not _is_positive(shares):
        raise Refusal("its routing weights may be less than 0")


def _block(group: int, columns: list[int]) -> int:
    """How many columns share a scale in QMoE: as many in both matrices, of one group, several blocks to a row."""
    for block in BLOCKS:
        if all(n % min(group, n) == 0 and min(group, n) % block == 0 and n > block for n in columns):
            return block
    raise Refusal(f"no blocks of 16 to {BLOCKS[0]} columns divide groups of {group} in rows of {columns}")


def _table(added: Added, weights: gs.Tensor, chosen: gs.Tensor, experts: int) -> gs.Tensor:
    """[B * T, E]: of a token, the weights of the experts that it chose; 0 of the others."""
    each, tokens = weights.shape[-1], f"{added.name}/tokens"
    shape = added.constant("choices_shape", [-1, each])
    own = added.node("Reshape", "own_weights", [weights, shape], np.float32, [tokens, each])
    places = added.node("Reshape", "own_experts", [chosen, shape], np.int32, [tokens, each])
    rows = added.node("Shape", "rows", [own], np.int64, [1], start=0, end=1)
    sizes = added.node("Concat", "table_shape", [rows, added.constant("experts", [experts])], np.int64, [2], axis=0)
    nothing = added.node("ConstantOfShape", "no_weights", [sizes], np.float32, [tokens, experts])
    given = [nothing, places, own]
    return added.node("ScatterElements", "table", given, np.float32, [tokens, experts], axis=1, reduction="add")


def _of_blocks(added: Added, groups: gs.Tensor, shape: list[int], times: int) -> gs.Tensor:
    """What groups share, once for each of their `times` blocks."""
    if times == 1:
        return groups
    experts, rows, blocks = shape
    name = groups.name
    apart = added.constant(f"{name}/apart", [experts, rows, blocks // times, 1])
    each = added.constant(f"{name}/each", [experts, rows, blocks // times, times])
    value = added.node("Reshape", f"{name}/groups", [groups, apart], groups.dtype, apart.values.tolist())
    value = added.node("Expand", f"{name}/repeated", [value, each], groups.dtype, each.values.tolist())
    return added.node("Reshape", f"{name}/blocks", [value, added.constant(f"{name}/shape", shape)], groups.dtype, shape)


def _packed(added: Added, points: gs.Tensor, shape: list[int]) -> gs.Tensor:
    """Zero points of 4 bits, a byte each, two a byte along the last axis, the first in the low half."""
    (experts, rows, blocks), name, byte = shape, points.name, np.uint8
    if blocks % 2:
        blocks += 1
        ends = added.constant(f"{name}/ends", [0, 0, 0, 0, 0, 1])
        points = added.node("Pad", f"{name}/even", [points, ends], byte, [experts, rows, blocks])
    pairs, half = [experts, rows, blocks // 2, 2], [experts, rows, blocks // 2]
    apart = added.node("Reshape", f"{name}/pairs", [points, added.constant(f"{name}/pairs_shape", pairs)], byte, pairs)
    first, second = (
        added.node("Gather", f"{name}/{said}", [apart, added.constant(f"{name}/{i}", i)], byte, half, axis=3)
        for i, said in enumerate(("first", "second"))
    )
    four = added.constant(f"{name}/four", 4, np.uint8)
    high = added.node("BitShift", f"{name}/high", [second, four], byte, half, direction="LEFT")
    return added.node("BitwiseOr", f"{name}/packed", [first, high], byte, half)


def _is_positive(value: gs.Tensor) -> bool:
    """Whether no number of it is less than 0, as the graph tells."""
    node = producer(value)
    if node is None:
        return False
    match node.op, node.domain or "":
        case ("MoeRoute", domain) if domain == DOMAIN:
            return float(node.attrs["scale"]) >= 0
        case ("Softmax" | "Sigmoid", ""):
            return True
        case ("GatherElements" | "Cast", ""):
            return _is_positive(node.inputs[0])
        case ("Concat", ""):
            return all(map(_is_positive, node.inputs))
    return False
