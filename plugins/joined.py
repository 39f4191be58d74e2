"""Plugins of our ops whose inputs are columns of one tensor, as one product by joined weights makes it.

trt/joined.h is the plugins' side. Imports neither torch nor TensorRT.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

JOINED = "Joined"  # before the name of an op, that of such a plugin
BIASED = "Biased"  # before that, the plugin whose second input is a bias [columns] of the tensor
BIASABLE = ("QkNormRopeWrite",)  # ops that have one
COLUMNS = "columns"  # its attribute that says which columns are which input


@dataclass(frozen=True)
class Part:
    """An input of an op: `sizes`, those behind B and T, in columns from `first` on."""

    name: str
    first: int
    sizes: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.first + math.prod(self.sizes)


def columns_of(parts: Iterable[Part]) -> list[int]:
    """The attribute, of all inputs that join in the order of the op's."""
    return [number for part in parts for number in (part.first, *part.sizes)]


def parts_of(inputs: Mapping[str, Sequence[str]], joins: Sequence[str], columns: Sequence[int]) -> list[Part]:
    """What the attribute says. Raises ValueError if it is not that of an op with these inputs, by their dimensions."""
    given, parts = iter(columns), []
    for name in joins:
        numbers = [*itertools.islice(given, len(inputs[name]) - 1)]
        parts.append(Part(name, numbers[0] if numbers else -1, tuple(numbers[1:])))
    wanted = sum(len(inputs[name]) - 1 for name in joins)
    if wanted != len(columns) or min(columns) < 0:
        raise ValueError(f"{list(columns)} are no columns of {', '.join(joins)}")
    return parts
