"""Fuses a residual add and the RMSNorm that reads the sum."""

from __future__ import annotations

from typing import Any

import onnx_graphsurgeon as gs

from llmexport.graphs import rms_norm
from llmexport.graphs.fusion import (
    Fused,
    Refusal,
    check_operands,
    fuse_each,
    is_output,
    other_input,
    produced_by,
    producer,
    replace,
    same_shape,
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

    Parts in brackets are optional; the two Casts come together (a norm that rounds after the weight). A norm that makes
    a summand is taken in: x is then what it reads, and its weight comes last. It stays if anything else reads it, or if
    its epsilon, rounding or offset is another. Legal if
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
    total = rms_norm.source_of(norm)
    add = _sum(total)
    if not same_shape(total, *add.inputs):
        raise Refusal("the sum broadcasts")
    check_operands(total, *add.inputs)
    found = rms_norm.read(graph, norm, "the sum")
    inputs, dead = [*add.inputs, found.weight], found.dead
    if inner := _inner(graph, add, found.attributes):
        inputs = [inner.source, other_input(add, inner.y), found.weight, inner.weight]
        dead += inner.dead
    replace(add, dead, "AddRmsNorm", inputs, [found.y, total], found.attributes)


def _inner(graph: gs.Graph, add: gs.Node, attributes: dict[str, Any]) -> rms_norm.RmsNorm | None:
    """The norm with these attributes that makes a summand, for this sum alone."""
    for summand in add.inputs:
        norm = rms_norm.norm_that_makes(summand)
        if norm is None or is_output(graph, summand) or len(summand.outputs) > 1:
            continue
        try:
            found = rms_norm.read(graph, norm, "its source")
        except Refusal:
            continue
        if found.y is summand and found.attributes == attributes and same_shape(found.source, summand):
            return found
    return None


def _sum(total: gs.Tensor) -> gs.Node:
    """The Add that makes the norm's input."""
    add = produced_by(total, "Add")
    if add is None:
        maker = producer(total)
        if maker is not None and maker.op == "AddRmsNorm" and maker.outputs[1] is total:
            raise Refusal("another norm has taken the sum")
        raise Refusal("its input is not a sum")
    return add
