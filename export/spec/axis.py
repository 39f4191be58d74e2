"""The dynamic axes of graphs, and what is known of their sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

BATCH, SEQUENCE, PAST, TOTAL, WRITTEN = "batch", "sequence", "past", "total", "written"
Sizes = tuple[int, int, int]


@dataclass(frozen=True)
class Axis:
    """A dynamic dimension, by the name that ports give it.

    `least` is the smallest size it may have; `profile` is (min, opt, max) of an engine for which nobody says
    others. An axis that is the `sum_of` others has neither: its sizes are the sums of theirs, `plus` a number.
    """

    name: str
    least: int = 1
    profile: Sizes | None = None
    sum_of: tuple[str, ...] = ()
    plus: int = 0


MOST = 2**30  # slots of a static cache, which says itself how many it has
_BEHIND = re.compile(rf"{SEQUENCE}_and_(\d+)")
AXES: Mapping[str, Axis] = MappingProxyType(
    {
        axis.name: axis
        for axis in (
            Axis(BATCH, profile=(1, 1, 4)),
            Axis(SEQUENCE, profile=(1, 64, 512)),
            Axis(PAST, least=0, profile=(0, 512, 2048)),
            # What attention sees, and the next step's past.
            Axis(TOTAL, sum_of=(PAST, SEQUENCE)),
            # The slots of a static cache that a mask speaks of: those up to the step's last token, or more.
            Axis(WRITTEN, profile=(1, MOST, MOST)),
        )
    }
)


def behind(kept: int) -> str:
    """The axis of a step's tokens behind a fixed number of earlier ones."""
    return f"{SEQUENCE}_and_{kept}"


def axis_of(name: str) -> Axis:
    """The axis of this name; one that nobody knows has no sizes of its own."""
    found = _BEHIND.fullmatch(name)
    return Axis(name, sum_of=(SEQUENCE,), plus=int(found[1])) if found else AXES.get(name, Axis(name))


def summands(name: str) -> tuple[str, ...]:
    """The axes whose sizes make that of this one: itself, if it is no sum."""
    return axis_of(name).sum_of or (name,)


def size_of(dim: int | str, sizes: Mapping[str, int], otherwise: int | None = None) -> int:
    """The size of a dimension where its axes have these; `otherwise` where they do not say."""
    if isinstance(dim, int):
        return dim
    if dim in sizes:
        return sizes[dim]
    if otherwise is not None and not all(n in sizes for n in summands(dim)):
        return otherwise
    return sum(sizes[n] for n in axis_of(dim).sum_of) + axis_of(dim).plus


def with_sums(sizes: Mapping[str, int]) -> dict[str, int]:
    """These sizes, by axis, and those of the axes that are sums of them."""
    sums = {a.name: sum(sizes[n] for n in a.sum_of) for a in AXES.values() if a.sum_of and sizes.keys() >= {*a.sum_of}}
    return {**sizes, **sums}
