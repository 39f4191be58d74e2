"""Where things stand in a page's pictures: errors along depth, on a log scale, and the map of blocks by rungs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmexport.validate.report import Rung

HEIGHT = 180  # of a plot, in pixels
MARGIN = 12  # above and below what is drawn
LEAST = 1e-6  # the share of a tolerance below which nothing is told apart
LABELS = 5  # along the horizontal axis
# Shares of the tolerance at which the map takes another colour.
SHADES = (1e-3, 1e-2, 0.1, 0.5, 1.0)


@dataclass(frozen=True)
class Point:
    """One comparison: x in percent of the width, y in pixels from the top, the share of its tolerance as `used`."""

    x: float
    y: float
    used: float
    detail: dict[str, Any]


@dataclass(frozen=True)
class Plot:
    """The comparisons of a rung along depth, or along the stages of a run.

    line: of each place, in order, the point that is nearest to its tolerance, or furthest beyond. others: the rest.
    ticks: y and power of ten; labels: x and name of a place. allowed: y of the tolerance.
    """

    along: str
    line: list[Point]
    others: list[Point]
    ticks: list[tuple[float, int]]
    labels: list[tuple[float, str]]
    allowed: float


@dataclass(frozen=True)
class Map:
    """The largest share of its tolerance that each block used, by row, in each of `columns`; None where it was not run.

    kinds: of block, by row.
    """

    columns: list[str]
    rows: dict[str, list[float | None]]
    kinds: dict[str, str]


def used(detail: dict[str, Any]) -> float:
    """The share of its tolerance that a comparison took: up to 1 is within."""
    return float(detail["difference"].excess(detail["allowed"]))


def place(detail: dict[str, Any]) -> str:
    """Where it was compared: a block, or a stage of a run."""
    return str(detail["step"]) if by_block(detail) else str(detail.get("stage", f"stage {detail['step']}"))


def by_block(detail: dict[str, Any]) -> bool:
    return isinstance(detail["step"], str)


def plot(rung: Rung) -> Plot:
    """The errors of a rung that has details."""
    places = list(dict.fromkeys(map(place, rung.details)))
    shares = [max(used(d), LEAST) for d in rung.details]
    known = [s for s in shares if math.isfinite(s)]
    low = math.floor(math.log10(min([*known, 0.1])))
    high = math.ceil(math.log10(max([*known, 10.0])))
    room = HEIGHT - 2 * MARGIN

    def y(share: float) -> float:
        return round(MARGIN + room * (high - math.log10(min(share, 10.0**high))) / (high - low), 1)

    def x(i: int) -> float:
        return round(100 * (i + 0.5) / len(places), 2)

    index = {name: i for i, name in enumerate(places)}
    worst: dict[str, Point] = {}
    others = []
    for detail, share in zip(rung.details, shares, strict=True):
        point, at = Point(x(index[place(detail)]), y(share), share, detail), place(detail)
        if at not in worst or share > worst[at].used:
            point, worst[at] = worst.get(at, point), point
        if point is not worst[at]:
            others.append(point)
    every = max(1, math.ceil((high - low) / 4))
    return Plot(
        "blocks" if by_block(rung.details[0]) else "stages",
        [worst[name] for name in places],
        others,
        [(y(10.0**power), power) for power in range(low, high + 1) if power % every == 0],
        [(x(i), places[i]) for i in _spread(len(places))],
        y(1.0),
    )


def block_map(rungs: Sequence[Rung]) -> Map | None:
    """Blocks by rungs, or by the runs of the one rung that has comparisons of blocks; None without any."""
    several = sum(any(map(by_block, r.details)) for r in rungs) > 1
    cells: dict[tuple[str, str], float] = {}
    kinds: dict[str, str] = {}
    columns: dict[str, None] = {}
    for rung in rungs:
        for detail in filter(by_block, rung.details):
            column, block = rung.name if several else str(detail.get("run", rung.name)), place(detail)
            cells[block, column] = max(used(detail), cells.get((block, column), 0.0))
            columns[column] = None
            kinds[block] = str(detail.get("kind") or kinds.get(block, ""))
    if not cells:
        return None
    return Map(list(columns), {b: [cells.get((b, c)) for c in columns] for b in kinds}, kinds)


def shade(share: float) -> int:
    """The colour of a share in the map: one more than the last is beyond the tolerance."""
    return sum(not share <= limit for limit in SHADES)


def _spread(places: int) -> list[int]:
    """Which places get a label: the first, the last, and some between."""
    n = min(places, LABELS)
    return sorted({round(i * (places - 1) / max(n - 1, 1)) for i in range(n)})
