"""What a layer of each kind computes: a function of its inputs, made once of the layer's attributes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes  # noqa: F401  teaches np.dtype "bfloat16"
import numpy as np

from llmexport.plugins.dtypes import BY_TENSORRT

Array = np.ndarray
# Takes the inputs of a layer, None where one is left out; gives its output, or a tuple of them.
Compute = Callable[..., Any]


class Unable(Exception):
    """A layer that cannot be computed here; the message names it."""


def numpy_type(dtype: Any) -> np.dtype[Any]:
    """Of a trt.DataType. Raises Unable on one that numpy has no arrays of."""
    known = BY_TENSORRT.get(dtype.name)
    if known is None:
        raise Unable(f"no numbers of type {dtype.name}")
    # Those of 4 bits take a byte each.
    return np.dtype(known.name)


def named(kind: str, table: Mapping[str, Any], value: Any) -> Any:
    """What a table says of a member of an enumeration of TensorRT's. Raises Unable if it says nothing."""
    if value.name not in table:
        raise Unable(f"{kind} {value.name} is not known here")
    return table[value.name]


def only(kind: str, found: Any, known: Any) -> None:
    """Raises Unable on an attribute that has another value than the one known here."""
    said = getattr(found, "name", found)
    if said != known:
        raise Unable(f"{kind} is {said}, known here is {known} alone")


def bits(mask: int) -> tuple[int, ...]:
    """The axes that a bit mask names."""
    return tuple(i for i in range(mask.bit_length()) if mask >> i & 1)


def integers(value: Array) -> list[int]:
    return [int(v) for v in np.asarray(value).reshape(-1)]


def scalar(value: Array) -> int:
    [number] = integers(value)
    return number
