"""Weights that are inputs of a network: products read them as they are bound, and nothing is made of them at each step.

`trt` is TensorRT's module, of whichever flavour.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any


def read_swapped(trt: Any, network: Any, weights: Collection[str]) -> None:
    """Lets matrix multiplications transpose the weights that a layer before them would: that layer is read no more,
    and TensorRT drops it."""
    swapped = {}
    for layer in _layers(network):
        if layer.type == trt.LayerType.SHUFFLE and layer.get_input(0).name in weights:
            layer.__class__ = trt.IShuffleLayer
            if _only_swaps(layer):
                swapped[layer.get_output(0).name] = layer.get_input(0)
        elif layer.type == trt.LayerType.MATRIX_MULTIPLY and (weight := swapped.get(layer.get_input(1).name)):
            layer.__class__ = trt.IMatrixMultiplyLayer
            if layer.op1 == trt.MatrixOperation.NONE:
                layer.set_input(1, weight)
                layer.op1 = trt.MatrixOperation.TRANSPOSE


def _only_swaps(layer: Any) -> bool:
    """Whether a shuffle swaps the last two axes and does nothing else."""
    shape, rank = layer.get_input(0).shape, len(layer.get_input(0).shape)
    order = [*range(rank - 2), rank - 1, rank - 2]
    orders = [list(axes)[:rank] for axes in (layer.first_transpose, layer.second_transpose)]
    return orders == [order, [*range(rank)]] and list(layer.get_output(0).shape) == [shape[i] for i in order]


def _only_widens(trt: Any, layer: Any) -> bool:
    """Whether a shuffle puts axes of size 1 before the others and does nothing else."""
    if layer.type != trt.LayerType.SHUFFLE:
        return False
    layer.__class__ = trt.IShuffleLayer
    before, after = (list(tensor.shape) for tensor in (layer.get_input(0), layer.get_output(0)))
    orders = [list(axes)[: len(s)] for axes, s in ((layer.first_transpose, before), (layer.second_transpose, after))]
    return orders == [sorted(o) for o in orders] and after == [1] * (len(after) - len(before)) + before


def computed(trt: Any, network: Any, weights: Collection[str], least: int) -> list[str]:
    """The layers that make `least` bytes or more of weights and constants alone, at every step.

    A layer that only adds axes of size 1, as the parser does before it adds a weight of fewer axes, makes nothing.
    """
    layers = _layers(network)
    read = {layer.get_input(i).name for layer in layers for i in range(layer.num_inputs) if layer.get_input(i)}
    alone = set(weights)
    found = []
    for layer in layers:
        inputs = [tensor.name for i in range(layer.num_inputs) if (tensor := layer.get_input(i))]
        if not alone.issuperset(inputs):
            continue
        for output in map(layer.get_output, range(layer.num_outputs)):
            alone.add(output.name)
            size = math.prod(output.shape) * output.dtype.itemsize
            # A branch's input is the weight itself.
            moves = inputs and layer.type != trt.LayerType.CONDITIONAL_INPUT and not _only_widens(trt, layer)
            if moves and size >= least and output.name in read:
                found.append(f"{layer.type.name} {layer.name}")
    return found


def _layers(network: Any) -> list[Any]:
    return [network.get_layer(i) for i in range(network.num_layers)]
