"""The sizes that an engine takes and is tuned for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from llmexport.export.errors import EngineError
from llmexport.export.spec import AXES, FEATURES, SPLICED, Block, Port, Sizes, axis_of, summands


@dataclass(frozen=True)
class Profile:
    """The sizes that an engine takes and is tuned for: (min, opt, max) of dynamic dimensions by name.

    What is not named has the sizes of its Axis, as far as the model takes them; one that is a sum, as `total` is
    past + sequence, cannot be named.
    """

    sizes: Mapping[str, Sizes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, (low, opt, high) in self.sizes.items():
            said = f"profile says {name}={low}:{opt}:{high}"
            axis = axis_of(name)
            if axis.sum_of:
                times = f"{axis.times} * " if axis.times > 1 else ""
                raise EngineError(f"{said}, but {name} is {times}{' + '.join(axis.sum_of)}: name those")
            if not axis.least <= low <= opt <= high < 2**31:
                raise EngineError(f"{said}: make it {axis.least} <= min <= opt <= max < 2**31")

    def resolve(self, ports: Iterable[Port], blocks: Iterable[Block] = ()) -> dict[str, Sizes]:
        """The sizes of every dynamic dimension of these ports, which are of a graph of these blocks.

        Raises EngineError on a dimension that they lack, and on sizes that a block does not take.
        """
        dims = {d for p in ports for d in p.shape if isinstance(d, str)}
        free = {n for d in dims for n in summands(d)}
        if stray := sorted(set(self.sizes) - free):
            known = ", ".join(sorted(free))
            raise EngineError(f"profile names {', '.join(stray)}: this export has the sizes {known}")
        bounds = [bound for block in blocks for bound in block.most.items()]
        most = {axis: min(size for a, size in bounds if a == axis) for axis, _ in bounds}
        for name, (_, _, high) in self.sizes.items():
            if high > most.get(name, high):
                raise EngineError(f"profile says up to {high} {name}: this model takes {most[name]} at most")
        defaults = {a.name: _up_to(most.get(a.name), a.profile) for a in AXES.values() if a.profile}
        sizes = {d: s for d, s in {**defaults, **self.sizes}.items() if d in free}
        if unsaid := sorted(free - set(sizes)):
            raise EngineError(f"{', '.join(unsaid)} has no default sizes: name it in --profile")
        if {FEATURES, SPLICED} <= sizes.keys() and sizes[FEATURES][2] > sizes[SPLICED][2]:
            made, taken = sizes[FEATURES][2], sizes[SPLICED][2]
            raise EngineError(
                f"profile says up to {made} {FEATURES}, and the decoder takes up to {taken} {SPLICED}: name both"
            )
        for dim in dims - free:
            axis, each = axis_of(dim), zip(*(sizes[n] for n in summands(dim)), strict=True)
            low, opt, high = (axis.times * sum(s) + axis.plus for s in each)
            sizes[dim] = (low, opt, high)
            if high >= 2**31:
                says = " and ".join(f"{sizes[n][2]} {n}" for n in summands(dim))
                raise EngineError(f"profile says up to {says}: make {dim} less than 2**31")
        return sizes


def _up_to(most: int | None, sizes: Sizes) -> Sizes:
    low, opt, high = (n if most is None else min(n, most) for n in sizes)
    return low, opt, high


def parse_profile(text: str) -> Profile:
    """The profile in a text like `batch=1:1:4,sequence=1:64:512,past=0:512:2048`; `batch=4` is 4:4:4."""
    sizes: dict[str, Sizes] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)=(\d{1,10})(?::(\d{1,10}):(\d{1,10}))?\s*", part, re.ASCII)
        if not match:
            raise EngineError(f"profile says {part!r}: write name=min:opt:max, as in batch=1:1:4, or batch=4")
        name, low, opt, high = match.groups()
        if name in sizes:
            raise EngineError(f"profile names {name} twice")
        sizes[name] = (int(low), int(opt or low), int(high or low))
    return Profile(sizes)
