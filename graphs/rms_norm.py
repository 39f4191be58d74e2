"""An RMSNorm as blocks write it, with what rounds it and what makes its weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto
from onnx.helper import tensor_dtype_to_np_dtype

from llmexport.graphs.fusion import Refusal, float_type, is_output, produced_by, producer, scalar, sole_consumer
from llmexport.plugins.dtypes import BY_NAME


@dataclass(frozen=True)
class RmsNorm:
    """y is the norm of `source`, both of one float type; `dead` are the nodes that make it, `attributes` those that our
    ops call a norm by, `weight` the stored one."""

    source: gs.Tensor
    weight: gs.Tensor
    y: gs.Tensor
    attributes: dict[str, Any]
    dead: tuple[gs.Node, ...]


def source_of(norm: gs.Node) -> gs.Tensor:
    """What an RMSNormalization normalises, before it is widened for that."""
    widen = produced_by(norm.inputs[0], "Cast")
    return widen.inputs[0] if widen else norm.inputs[0]


def norm_that_makes(value: gs.Tensor) -> gs.Node | None:
    """The RMSNormalization whose result this is, cast back or not."""
    narrow = produced_by(value, "Cast")
    return produced_by(narrow.inputs[0] if narrow else value, "RMSNormalization")


def read(graph: gs.Graph, norm: gs.Node, what: str) -> RmsNorm:
    """Reads an RMSNormalization of `what`. Raises Refusal unless

    - it normalises the last axis, with statistics in fp32,
    - it gives the type it takes; or it is in fp32 of a narrower source, cast back to its type, and read only so,
    - the weight has one value per channel and the type of the source, and is stored, or a cast of what is.
    """
    source, total = norm.inputs[0], source_of(norm)
    if norm.attrs.get("axis", -1) not in (-1, len(total.shape or ()) - 1):
        raise Refusal(f"it normalises from axis {norm.attrs['axis']}, not the last")
    if norm.attrs.get("stash_type", 1) != 1:
        raise Refusal("its statistics are not in fp32")
    y = norm.outputs[0]
    if float_type(source) != float_type(y):
        raise Refusal("the norm changes the type")
    dead = [norm]
    if total is not source:
        dead.append(_cast_back(graph, source, y, total, what))
        y = dead[-1].outputs[0]
    weight, offset = _weight(norm.inputs[1])
    if list(weight.shape or ()) != [(total.shape or [None])[-1]]:
        raise Refusal("the weight is not one value per channel")
    weight = _as_type(weight, float_type(total))
    if float_type(weight) != float_type(total):
        raise Refusal(f"the weight is {float_type(weight)}, {what} {float_type(total)}")
    maker = producer(weight)
    if maker and not (maker.op == "Cast" and isinstance(maker.inputs[0], gs.Constant)):
        raise Refusal("the weight is computed")
    attributes = {
        "epsilon": float(norm.attrs.get("epsilon", 1e-5)),
        "round_before_weight": int(total is source),
        "weight_offset": offset,
    }
    return RmsNorm(total, weight, y, attributes, tuple(dead))


def _cast_back(graph: gs.Graph, wide: gs.Tensor, y: gs.Tensor, total: gs.Tensor, what: str) -> gs.Node:
    """The Cast after a norm in fp32, which undoes the one before it."""
    if float_type(wide) != "float32":
        raise Refusal(f"{what} is cast to {float_type(wide)} before the norm")
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


def _as_type(weight: gs.Tensor, kind: str) -> gs.Tensor:
    """A constant weight in another type, if that holds the same numbers, as the ones of a norm without a weight; what
    lies in a file stays as it is, unread."""
    if not isinstance(weight, gs.Constant) or float_type(weight) == kind or not kind:
        return weight
    if weight.data_location == TensorProto.EXTERNAL:
        return weight
    values = np.asarray(weight.values)
    narrow = values.astype(tensor_dtype_to_np_dtype(BY_NAME[kind].onnx))
    same = np.array_equal(narrow.astype(values.dtype), values)
    return gs.Constant(f"{weight.name}/{kind}", narrow) if same else weight
