"""Layers that move numbers and compute none: slices, gathers, shuffles, scatters, casts, and what is said of shapes."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import numpy as np

from llmexport.export.network.kinds import Array, Compute, Unable, integers, named, numpy_type, only


def identity(layer: Any) -> Compute:
    return lambda x: x


def cast(layer: Any) -> Compute:
    dtype = numpy_type(layer.get_output(0).dtype)
    return lambda x: x.astype(dtype, copy=False)


def shape(layer: Any) -> Compute:
    return lambda x: np.array(x.shape, np.int64)


def shuffle(layer: Any) -> Compute:
    first, second = tuple(layer.first_transpose), tuple(layer.second_transpose)
    dims = None if layer.num_inputs > 1 else layer.reshape_dims
    fixed, zero_copies = None if dims is None else list(dims), layer.zero_is_placeholder

    def compute(x: Array, given: Array | None = None) -> Array:
        x = np.transpose(x, first[: x.ndim])
        dims = fixed if given is None else integers(given)
        if dims is not None:
            x = x.reshape([x.shape[i] if n == 0 and zero_copies else n for i, n in enumerate(dims)])
        return np.transpose(x, second[: x.ndim])

    return compute


def unsqueeze(layer: Any) -> Compute:
    return lambda x, axes: np.expand_dims(x, tuple(integers(axes)))


def squeeze(layer: Any) -> Compute:
    return lambda x, axes=None: np.squeeze(x, None if axes is None else tuple(integers(axes)))


def concatenation(layer: Any) -> Compute:
    axis = layer.axis
    return lambda *parts: np.concatenate(parts, axis)


def select(layer: Any) -> Compute:
    return np.where


# Which entry of an axis of n an index stands for that may lie outside.
OUTSIDE: MappingProxyType[str, Callable[[Array, int], Array]] = MappingProxyType(
    {
        "CLAMP": lambda i, n: np.clip(i, 0, n - 1),
        "FILL": lambda i, n: np.clip(i, 0, n - 1),
        "WRAP": lambda i, n: i % n,
        "REFLECT": lambda i, n: np.abs((i + n - 1) % max(2 * n - 2, 1) - (n - 1)),
    }
)


def slice_(layer: Any) -> Compute:
    mode = layer.mode.name
    inside = named("mode", {**OUTSIDE, "STRICT_BOUNDS": None}, layer.mode)
    # What an input says is not held.
    held = [list(d or ()) for d in (layer.start, layer.shape, layer.stride)]
    held_axes = None if layer.axes is None else list(layer.axes)

    def compute(
        x: Array,
        start: Array | None = None,
        size: Array | None = None,
        stride: Array | None = None,
        fill: Array | None = None,
        axes: Array | None = None,
    ) -> Array:
        given = (start, size, stride)
        starts, sizes, strides = (own if g is None else integers(g) for g, own in zip(given, held, strict=True))
        along = integers(axes) if axes is not None else held_axes or range(x.ndim)
        if inside is None:
            return _within(x, along, starts, sizes, strides)
        for axis, first, count, step in zip(along, starts, sizes, strides, strict=True):
            index, most = first + step * np.arange(count), x.shape[axis]
            if most == 0 and count:
                x = np.zeros([count if i == axis % x.ndim else n for i, n in enumerate(x.shape)], x.dtype)
            else:
                x = np.take(x, inside(index, most), axis)
            if mode == "FILL":
                out = np.expand_dims((index < 0) | (index >= most), tuple(range(1, x.ndim - axis % x.ndim)))
                x = np.where(out, np.zeros((), x.dtype) if fill is None else fill.reshape(()), x)
        return x

    return compute


def _within(x: Array, axes: Any, starts: Any, sizes: Any, strides: Any) -> Array:
    index, shape = [slice(None)] * x.ndim, list(x.shape)
    for axis, first, count, step in zip(axes, starts, sizes, strides, strict=True):
        last = first + step * (count - 1)
        if count and not (0 <= first < x.shape[axis] and 0 <= last < x.shape[axis]):
            raise Unable(f"reads {first} to {last} of axis {axis}, which has {x.shape[axis]} entries")
        end = last + (-1 if step < 0 else 1)
        index[axis] = slice(first, None if end < 0 else end, step or 1) if count else slice(0, 0)
        shape[axis] = count
    # A step of 0 repeats one entry.
    return np.broadcast_to(x[tuple(index)], shape)


def gather(layer: Any) -> Compute:
    axis, leading = layer.axis, layer.num_elementwise_dims

    def default(x: Array, index: Array) -> Array:
        _check(index, x.shape[axis])
        if not leading:
            return np.take(x, index, axis)
        rows = [np.take(x[at], index[at], axis - leading) for at in np.ndindex(x.shape[:leading])]
        return np.stack(rows).reshape(x.shape[:leading] + rows[0].shape)

    def element(x: Array, index: Array) -> Array:
        _check(index, x.shape[axis])
        return x[_places(index, axis)]

    def nd(x: Array, index: Array) -> Array:
        places = np.moveaxis(index, -1, 0)
        for place, most in zip(places, x.shape[leading:], strict=False):
            _check(place, most)
        shape = index.shape[:leading]
        rows = np.ix_(*map(np.arange, shape)) if leading else ()
        rest = index.ndim - 1 - leading
        return x[tuple(r.reshape(r.shape + (1,) * rest) for r in rows) + tuple(places)]

    return named("mode", {"DEFAULT": default, "ELEMENT": element, "ND": nd}, layer.mode)


def _places(index: Array, axis: int) -> tuple[Array, ...]:
    """Where each of its entries points: along the axis, and else where it lies itself."""
    places: list[Array] = [*np.ogrid[tuple(map(slice, index.shape))]]
    places[axis] = index
    return tuple(places)


def _check(index: Array, most: int) -> None:
    # What TensorRT reads outside is not said; no index of ours is negative.
    if index.size and (index.min() < 0 or index.max() >= most):
        raise Unable(f"reads {index.min()} to {index.max()} of {most} entries")


def scatter(layer: Any) -> Compute:
    axis = layer.axis

    def element(x: Array, index: Array, updates: Array) -> Array:
        _check(index, x.shape[axis])
        made = x.copy()
        made[_places(index, axis)] = updates
        return made

    def nd(x: Array, index: Array, updates: Array) -> Array:
        made = x.copy()
        made[tuple(np.moveaxis(index, -1, 0))] = updates
        return made

    return named("mode", {"ELEMENT": element, "ND": nd}, layer.mode)


def fill(layer: Any) -> Compute:
    only("operation", layer.operation, "LINSPACE")
    dtype = numpy_type(layer.get_output(0).dtype)
    # What an input says is not held.
    held_shape, held_start, held_step = list(layer.shape or ()), layer.alpha, layer.beta

    def compute(dims: Array | None = None, start: Array | None = None, step: Array | None = None) -> Array:
        shape = held_shape if dims is None else integers(dims)
        made: Array = np.full(shape, held_start if start is None else start, dtype)
        for axis, by in enumerate(np.atleast_1d(held_step if step is None else step)):
            made = made + np.expand_dims(by * np.arange(shape[axis]), tuple(range(1, len(shape) - axis)))
        return made.astype(dtype)

    return compute


def kv_cache_update(layer: Any) -> Compute:
    only("cache mode", layer.cache_mode, "LINEAR")
    only("form", layer.update_form, "PADDED_BHND")
    only("lengths", layer.update_lengths, None)

    def compute(cache: Array, update: Array, starts: Array) -> Array:
        made = cache.copy()
        for row, start in enumerate(integers(starts)):
            end = start + update.shape[2]
            if not 0 <= start <= end <= cache.shape[2]:
                raise Unable(f"writes {start} to {end} of a cache of {cache.shape[2]}")
            made[row, :, start:end] = update[row]
        return made

    return compute


def assertion(layer: Any) -> Compute:
    message = layer.message

    def compute(said: Array) -> tuple[()]:
        if not np.all(said):
            raise Unable(f"asserts {message!r}, which is false")
        return ()

    return compute
