"""JSON data as frozen dataclasses, strictly: every key is there, none more, and each value is of its type."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

# What reading a file that nobody vouches for may raise, beside OSError.
DAMAGED = (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError)


def typed(kind: Any, data: Any, where: str = "it") -> Any:
    """JSON data as a value of a type that is made of dataclasses, tuples, mappings and plain types, and no other.

    Raises TypeError or ValueError, which names the place, where the data is not of this type.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        names = [f.name for f in dataclasses.fields(kind)]
        if not isinstance(data, dict) or data.keys() != set(names):
            odd = sorted(set(names) ^ data.keys())[:3] if isinstance(data, dict) else data
            raise ValueError(f"{where}: {odd}")
        return typing.cast(Any, kind)(**{n: typed(hints[n], data[n], n) for n in names})
    if origin in (typing.Union, types.UnionType):
        return _first(inner, data, where)
    if origin is typing.Literal:
        if data not in inner:
            raise ValueError(f"{where} is {data!r}")
        return data
    if origin is tuple:
        if not isinstance(data, list) or (inner[-1] is not ... and len(data) != len(inner)):
            raise TypeError(f"{where} is {data!r}")
        kinds = [inner[0]] * len(data) if inner[-1] is ... else inner
        return tuple(typed(k, d, where) for k, d in zip(kinds, data, strict=True))
    if origin is not None:
        if not isinstance(data, dict):
            raise TypeError(f"{where} is {data!r}")
        return {typed(inner[0], k, where): typed(inner[1], v, where) for k, v in data.items()}
    if type(data) is not kind and not (kind is float and type(data) is int):
        raise TypeError(f"{where} is {data!r}")
    return data


def _first(kinds: tuple[Any, ...], data: Any, where: str) -> Any:
    """The data as the first of several types that it is of."""
    reasons: list[Exception] = []
    for kind in kinds:
        try:
            return typed(kind, data, where)
        except (TypeError, ValueError) as error:
            reasons.append(error)
    raise reasons[0]
