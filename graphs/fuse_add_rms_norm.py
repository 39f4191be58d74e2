"""Fuses a residual add and the RMSNorm that reads the sum."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from llmexport.graphs.fusion import (
    Fused,
    Refusal,
    check_operands,
    float_type,
    fuse_each,
    is_output,
    produced_by,
    producer,
    replace,
    same_shape,
    scalar,
    sole_consumer,
)


def fuse_add_rms_norm(graph: gs.Graph) -> Fused:
    """Rewrites every legal pair, and names the norms that it leaves.

        x   residual             [w]                  x  residual  w
         \\   /                    |                     \\    |    /
          Add ---- sum        [Cast][Add offset]        AddRmsNorm
           |                       |             =>      |      |
        [Cast]                     |                     y     sum
           |                       |
        RMSNormalization ----------+
           |
        [Cast] - y

    Parts in brackets are optional; the two Casts come together (a norm that rounds after the weight). Legal if
    1. the norm's input is a sum,
    2. it normalises the last axis, with statistics in fp32,
    3. both summands have the shape of the sum, nothing is broadcast; all are of one float type and of rank 3,
    4. the weight has one value per channel, the type of the summands, and is stored, not computed,
    5. no other norm has already taken the sum,
    6. a norm in fp32 of a narrower sum is cast back to the sum's type, and read only through that cast; any other
       norm gives the type it takes.
    """
    return fuse_each(graph, ("RMSNormalization",), _fuse)


def _fuse(graph: gs.Graph, norm: gs.Node) -> None:
    source, scale = norm.inputs[0], norm.inputs[1]
    widen = produced_by(source, "Cast")
    total = widen.inputs[0] if widen else source
    add = _sum(total)
    _check_norm(norm, len(total.shape or ()))
    if not same_shape(total, *add.inputs):
        raise Refusal("the sum broadcasts")
    check_operands(total, *add.inputs)
    dead = [norm]
    y = norm.outputs[0]
    if float_type(source) != float_type(y):
        raise Refusal("the norm changes the type")
    if widen:
        dead.append(_cast_back(graph, widen, y, total))
        y = dead[-1].outputs[0]
    weight, offset = _weight(scale)
    if list(weight.shape or ()) != [total.shape[-1]]:
        raise Refusal("the weight is not one value per channel")
    if float_type(weight) != float_type(total):
        raise Refusal(f"the weight is {float_type(weight)}, the sum {float_type(total)}")
    if producer(weight):
        raise Refusal("the weight is computed")
    attributes = {
        "epsilon": float(norm.attrs.get("epsilon", 1e-5)),
        "round_before_weight": int(widen is None),
        "weight_offset": offset,
    }
    x, residual = add.inputs
    replace(add, dead, "AddRmsNorm", [x, residual, weight], [y, total], attributes)


def _sum(total: gs.Tensor) -> gs.Node:
    """The Add that makes the norm's input."""
    add = produced_by(total, "Add")
    if add is None:
        maker = producer(total)
        if maker is not None and maker.op == "AddRmsNorm" and maker.outputs[1] is total:
            raise Refusal("another norm has taken the sum")
        raise Refusal("its input is not a sum")
    return add


def _check_norm(norm: gs.Node, rank: int) -> None:
    if norm.attrs.get("axis", -1) not in (-1, rank - 1):
        raise Refusal(f"it normalises from axis {norm.attrs['axis']}, not the last")
    if norm.attrs.get("stash_type", 1) != 1:
        raise Refusal("its statistics are not in fp32")


def _cast_back(graph: gs.Graph, widen: gs.Node, y: gs.Tensor, total: gs.Tensor) -> gs.Node:
    """The Cast after a norm in fp32, which undoes the one before it."""
    if float_type(widen.outputs[0]) != "float32":
        raise Refusal(f"the sum is cast to {float_type(widen.outputs[0])} before the norm")
    if is_output(graph, y):
        raise Refusal("the fp32 norm is a graph output")
    narrow = sole_consumer(y, "the fp32 norm")
    if narrow.op != "Cast" or narrow.domain or float_type(narrow.outputs[0]) != float_type(total):
        raise Refusal("the fp32 norm is not cast back")
    return narrow


def _weight(scale: gs.Tensor) -> tuple[gs.Tensor, float]:
    """The stored weight behind a norm's scale, and the offset added to it."""
    offset = 0.0
    add = produced_by(scale, "Add")
    if add:
        numbers = [scalar(v) for v in add.inputs]
        if numbers[1] is not None:
            scale, offset = add.inputs[0], numbers[1]
        elif numbers[0] is not None:
            scale, offset = add.inputs[1], numbers[0]
    cast = produced_by(scale, "Cast")
    return (cast.inputs[0] if cast else scale), offset
