"""Gives AddRmsNorm in float32 to SkipSimplifiedLayerNormalization of com.microsoft, with a bias of what is added."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from llmexport.graphs.fusion import Added, Fused, float_type, fuse_each, is_output, other_input, produced_by

NORM, SUM = "SkipSimplifiedLayerNormalization", 3  # and which of its outputs the sum is


def lower_add_rms_norm(graph: gs.Graph) -> Fused:
    """Rewrites every AddRmsNorm that it can be.

        a   [bias]                       a  residual  w  [bias]
         \\   /                            \\    |     /   /
         [Add]  residual   w         SkipSimplifiedLayerNormalization
            \\      |      /                |         |
              AddRmsNorm           =>       y        sum
               |      |
               y     sum

    It is one node for a function of several, opens faster for that and takes less time. An offset is added to the
    weight before, which ONNX Runtime folds. Those in another type, or with a norm of what is added, are no candidates.
    A bias is taken in if it is [C], and nothing else reads the sum with it.
    """
    return fuse_each(graph, ("AddRmsNorm",), _lower, where=_has_form)


def _has_form(node: gs.Node) -> bool:
    return len(node.inputs) == 3 and float_type(node.inputs[0]) == "float32"


def _lower(graph: gs.Graph, node: gs.Node) -> None:
    summands, weight, [y, total] = node.inputs[:2], node.inputs[2], node.outputs
    bias = list[gs.Tensor]()
    for i, summand in enumerate(summands):
        if not bias and (found := _bias(graph, summand)) is not None:
            bias, summands[i] = [found], other_input(summand.inputs[0], found)
    if node.attrs["weight_offset"]:
        added = Added(node.name)
        offset = added.constant("offset", node.attrs["weight_offset"], np.float32)
        weight = added.node("Add", "weight", [weight, offset], np.float32, weight.shape)
        at = graph.nodes.index(node)
        graph.nodes[at:at] = added.nodes
    node.inputs.clear()
    node.outputs.clear()
    node.op, node.domain, node.attrs = NORM, "com.microsoft", {"epsilon": node.attrs["epsilon"]}
    node.inputs.extend([*summands, weight, *bias])
    # Mean and deviation are in between, which it does not give on a CPU.
    node.outputs.extend([y, *(gs.Variable.empty() for _ in range(SUM - 1)), total])


def _bias(graph: gs.Graph, value: gs.Tensor) -> gs.Tensor | None:
    """The [C] that is added to make a value, for one reader alone."""
    add = produced_by(value, "Add")
    if add is None or len(value.outputs) > 1 or is_output(graph, value):
        return None
    flat = [v for v in add.inputs if len(v.shape or ()) == 1 and v.dtype == np.float32]
    whole = [v for v in add.inputs if v.shape is not None and list(v.shape) == list(value.shape or ())]
    return flat[0] if flat and whole and list(flat[0].shape) == list(value.shape or ())[-1:] else None
