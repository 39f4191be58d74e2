"""Layers that are a part of a network by themselves; numbers of 16 bits reach them as float32."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from llmexport.export.network.computing import exponentials
from llmexport.export.network.kinds import Array, Compute, Unable, integers, named, only


def rotary_embedding(layer: Any) -> Compute:
    """x [B, H, T, D]; cos and sin [B, T, R/2], or [positions, R/2] with the positions [B, T]."""
    interleaved, rotated = layer.interleaved, layer.rotary_embedding_dim

    def compute(x: Array, cos: Array, sin: Array, positions: Array | None = None) -> Array:
        cos, sin = (np.expand_dims(c if positions is None else c[positions], 1) for c in (cos, sin))
        size = rotated or x.shape[-1]
        turning, rest = x[..., :size], x[..., size:]
        first, second = (turning[..., ::2], turning[..., 1::2]) if interleaved else np.split(turning, 2, axis=-1)
        halves = [first * cos - second * sin, second * cos + first * sin]
        turned = np.stack(halves, -1).reshape(turning.shape) if interleaved else np.concatenate(halves, -1)
        return np.concatenate([turned, rest], -1)

    return compute


def attention(layer: Any) -> Compute:
    """q [B, heads, T, D], k and v [B, groups, S, D]; a mask of bools says who is seen, one of numbers is added.

    The scores are not scaled: the parser scales q and k. What a mask hides scores the lowest number of float32, so that
    a row that sees nothing is the mean of v, as in ONNX.
    """
    said = layer.attention
    for what, found in (("query form", said.query_form), ("form of keys and values", said.key_value_form)):
        only(what, found, "PADDED_BHND")
    for what, found in (
        ("lengths of queries", said.query_lengths),
        ("lengths of keys and values", said.key_value_lengths),
        ("quantisation", said.normalization_quantize_scale),
    ):
        only(what, found, None)
    normalised = named("normalisation", {"SOFTMAX": True, "NONE": False}, said.norm_op)
    # How many keys before the first query the causal triangle begins at.
    shift = named("causal kind", {"NONE": None, "UPPER_LEFT": False, "LOWER_RIGHT": True}, said.causal_kind)
    masked = said.mask is not None
    if layer.num_inputs != 3 + masked or (masked and layer.get_input(3).name != said.mask.name):
        raise Unable(f"{layer.num_inputs} inputs are not q, k, v{' and a mask' if masked else ''}")

    def compute(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
        lowest = np.finfo(np.float32).min
        k, v = (np.repeat(x, q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = q @ np.swapaxes(k, -1, -2)
        if shift is not None:
            rows, columns = scores.shape[-2:]
            scores = np.where(np.tri(rows, columns, columns - rows if shift else 0, dtype=bool), scores, lowest)
        if mask is not None:
            scores = np.where(mask, scores, lowest) if mask.dtype == bool else scores + mask
        return (exponentials(scores, (-1,)) if normalised else scores) @ v

    return compute


def convolution(layer: Any, kernel: Array | None, bias: Array | None) -> Compute:
    """x [B, C, ...]; kernel [O, C/groups, ...]; `kernel` and `bias` are held by the layer, or are inputs."""
    only("padding mode", layer.padding_mode, "EXPLICIT_ROUND_DOWN")
    groups, maps, sizes = layer.num_groups, layer.num_output_maps, tuple(layer.kernel_size_nd)
    strides, dilations = tuple(layer.stride_nd), tuple(layer.dilation_nd)
    padding = [(0, 0), (0, 0), *zip(layer.pre_padding, layer.post_padding, strict=True)]

    def compute(x: Array, weight: Array | None = kernel, offset: Array | None = bias) -> Array:
        x, rank = np.pad(x, padding), len(sizes)
        spans = tuple((n - 1) * d + 1 for n, d in zip(sizes, dilations, strict=True))
        windows = np.lib.stride_tricks.sliding_window_view(x, spans, tuple(range(2, 2 + rank)))
        steps = [slice(None, None, s) for s in (*strides, *dilations)]
        windows = windows[(slice(None), slice(None), *steps)]
        batch, channels, *rest = windows.shape
        inside = channels // groups * math.prod(sizes)
        # [B, G, places, C/G * kernel] @ [G, C/G * kernel, O/G]
        columns = windows.reshape(batch, groups, channels // groups, *rest)
        columns = np.moveaxis(columns, 2, 2 + rank).reshape(batch, groups, -1, inside)
        made = columns @ np.swapaxes(np.asarray(weight).reshape(groups, maps // groups, inside), 1, 2)
        made = np.swapaxes(made, 2, 3).reshape(batch, maps, *rest[:rank])
        return made if offset is None else made + offset.reshape(-1, *(1,) * rank)

    return compute


def resize(layer: Any) -> Compute:
    """Along each axis by itself: the nearest entry, or the line through two."""
    linear = named("mode", {"NEAREST": False, "LINEAR": True}, layer.resize_mode)
    only("selector", layer.selector_for_single_pixel, "FORMULA")
    only("weights outside left out", layer.exclude_outside, False)
    transformation = named(
        "coordinates",
        {
            "ALIGN_CORNERS": lambda i, n, m, scale: i * ((n - 1) / max(m - 1, 1)),
            "ASYMMETRIC": lambda i, n, m, scale: i / scale,
            "HALF_PIXEL": lambda i, n, m, scale: (i + 0.5) / scale - 0.5,
        },
        layer.coordinate_transformation,
    )
    rounding = named(
        "rounding",
        {
            "FLOOR": np.floor,
            "CEIL": np.ceil,
            "HALF_UP": lambda at: np.floor(at + 0.5),
            "HALF_DOWN": lambda at: np.ceil(at - 0.5),
        },
        layer.nearest_rounding,
    )
    held, scales = None if layer.shape is None else list(layer.shape), list(layer.scales or ())

    def compute(x: Array, given: Array | None = None) -> Array:
        sizes = held if given is None else integers(given)
        for axis, n in enumerate(x.shape):
            m = sizes[axis] if sizes else int(n * scales[axis])
            if m == n and not (scales and scales[axis] != 1):
                continue
            at = transformation(np.arange(m), n, m, scales[axis] if scales else m / n)
            if not linear:
                x = np.take(x, np.clip(rounding(at), 0, n - 1).astype(int), axis)
                continue
            at = np.clip(at, 0, n - 1)
            low = np.floor(at).astype(int)
            part = np.expand_dims((at - low).astype(x.dtype), tuple(range(1, x.ndim - axis)))
            x = np.take(x, low, axis) * (1 - part) + np.take(x, np.minimum(low + 1, n - 1), axis) * part
        return x

    return compute
