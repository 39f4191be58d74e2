"""A small set of cases in which every value of a parameter meets every value of every other one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any


def pairwise(*parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Cases, each with one value a parameter, among which each pair of values of two parameters occurs.

    Greedy: each case begins with a pair that is still to come and adds the value that brings the most of them; about
    as many cases as the two longest parameters have pairs.
    """
    places = range(len(parameters))
    to_come = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(places, 2)
        for i in range(len(parameters[a]))
        for j in range(len(parameters[b]))
    }
    cases = []
    while to_come:
        case = dict(min(to_come))
        for place in places:
            if place not in case:
                brings = [len(_pairs({**case, place: i}) & to_come) for i in range(len(parameters[place]))]
                case[place] = brings.index(max(brings))
        to_come -= _pairs(case)
        cases.append(tuple(parameters[p][case[p]] for p in places))
    return cases


def _pairs(case: dict[int, int]) -> set[tuple[tuple[int, int], tuple[int, int]]]:
    return set(itertools.combinations(sorted(case.items()), 2))
