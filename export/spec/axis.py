"""The dynamic axes of graphs, and what is known of their sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

BATCH, SEQUENCE, PAST, TOTAL = "batch", "sequence", "past", "total"
Sizes = tuple[int, int, int]


@dataclass(frozen=True)
class Axis:
    """A dynamic dimension, by the name that ports give it.

    `least` is the smallest size it may have; `profile` is (min, opt, max) of an engine for which nobody says
    others. An axis that is the `sum_of` others has neither: its sizes are the sums of theirs.
    """

    name: str
    least: int = 1
    profile: Sizes | None = None
    sum_of: tuple[str, ...] = ()


AXES: Mapping[str, Axis] = MappingProxyType(
    {
        axis.name: axis
        for axis in (
            Axis(BATCH, profile=(1, 1, 4)),
            Axis(SEQUENCE, profile=(1, 64, 512)),
            Axis(PAST, least=0, profile=(0, 512, 2048)),
            # What attention sees, and the next step's past.
            Axis(TOTAL, sum_of=(PAST, SEQUENCE)),
        )
    }
)


def summands(name: str) -> tuple[str, ...]:
    """The axes whose sizes make that of this one: itself, if it is no sum."""
    axis = AXES.get(name)
    return axis.sum_of if axis and axis.sum_of else (name,)


def with_sums(sizes: Mapping[str, int]) -> dict[str, int]:
    """These sizes, by axis, and those of the axes that are sums of them."""
    sums = {a.name: sum(sizes[n] for n in a.sum_of) for a in AXES.values() if a.sum_of and sizes.keys() >= {*a.sum_of}}
    return {**sizes, **sums}
