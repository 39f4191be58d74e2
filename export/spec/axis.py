"""The dynamic axes of graphs, and what is known of their sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

BATCH, SEQUENCE, PAST, TOTAL, WRITTEN = "batch", "sequence", "past", "total", "written"
IMAGES, TILES, FEATURES, SPLICED, SOURCE = "images", "tiles", "features", "spliced", "source"
Sizes = tuple[int, int, int]


@dataclass(frozen=True)
class Axis:
    """A dynamic dimension, by the name that ports give it.

    `least` is the smallest size it may have; `profile` is (min, opt, max) of an engine for which nobody says
    others. An axis that is the `sum_of` others has neither: its sizes are the sums of theirs, `times` a number, `plus`
    another.
    """

    name: str
    least: int = 1
    profile: Sizes | None = None
    sum_of: tuple[str, ...] = ()
    plus: int = 0
    times: int = 1


MOST = 2**30  # slots of a static cache, which says itself how many it has
_BEHIND = re.compile(rf"{SEQUENCE}_and_(\d+)")
_PATCHES = re.compile(rf"{FEATURES}_times_(\d+)")
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
            # Pictures of a packed row of patches, or pieces of one size that a picture is cut into.
            Axis(IMAGES, profile=(1, 1, 16)),
            Axis(TILES, profile=(1, 5, 17)),
            # What a vision tower gives, a row for each token that it stands for. In float32 the scores of 16 heads over
            # 4 * 2048 patches, which are not fused there, take 4 GiB.
            Axis(FEATURES, profile=(1, 256, 2048)),
            # What a step is given of them, or of all tiles of a large picture.
            Axis(SPLICED, least=0, profile=(0, 256, 4096)),
            # The tokens of a text that an encoder reads, and a decoder sees at each of its steps.
            Axis(SOURCE, profile=(1, 64, 512)),
        )
    }
)


def behind(kept: int) -> str:
    """The axis of a step's tokens behind a fixed number of earlier ones."""
    return f"{SEQUENCE}_and_{kept}"


def patch_axis(merged: int) -> str:
    """The axis of patches of which so many, side by side, make a feature."""
    return FEATURES if merged == 1 else f"{FEATURES}_times_{merged}"


def axis_of(name: str) -> Axis:
    """The axis of this name; one that nobody knows has no sizes of its own."""
    if found := _BEHIND.fullmatch(name):
        return Axis(name, sum_of=(SEQUENCE,), plus=int(found[1]))
    if found := _PATCHES.fullmatch(name):
        return Axis(name, sum_of=(FEATURES,), times=int(found[1]))
    return AXES.get(name, Axis(name))


def summands(name: str) -> tuple[str, ...]:
    """The axes whose sizes make that of this one: itself, if it is no sum."""
    return axis_of(name).sum_of or (name,)


def size_of(dim: int | str, sizes: Mapping[str, int], otherwise: int | None = None) -> int:
    """The size of a dimension where its axes have these; `otherwise` is that of an axis of which they do not say it."""
    if isinstance(dim, int):
        return dim
    if dim in sizes:
        return sizes[dim]
    axis = axis_of(dim)
    if otherwise is not None:
        if not axis.sum_of:
            return otherwise
        sizes = dict.fromkeys(axis.sum_of, otherwise) | {**sizes}
    return axis.times * sum(sizes[n] for n in axis.sum_of) + axis.plus


def with_sums(sizes: Mapping[str, int]) -> dict[str, int]:
    """These sizes, by axis, and those of the axes that are sums of them."""
    sums = {a.name: sum(sizes[n] for n in a.sum_of) for a in AXES.values() if a.sum_of and sizes.keys() >= {*a.sum_of}}
    return {**sizes, **sums}
