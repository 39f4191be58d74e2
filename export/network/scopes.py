"""Where each layer of a network is computed: once, at every turn of a loop, or where a condition takes its branch.

TensorRT lists layers without nesting. A layer belongs to the loops whose turns it depends on, and to a branch if nobody
outside reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from llmexport.export.network.layers import Layer


class Along(NamedTuple):
    """A tensor that turns go over, or that they make, along an axis; `axis` is None for the last turn's."""

    source: str
    axis: int | None
    back: bool = False
    length: str = ""  # the tensor that says how many turns there are, if one does


@dataclass(eq=False)
class Loop:
    """Tensors by name. trip: how many turns there are at most; condition: what ends them before one, if it is false; ""
    if there is no such limit. carried: what a recurrence gives, what it begins with, and what it goes on with."""

    name: str
    trip: str = ""
    condition: str = ""
    carried: dict[str, tuple[str, str]] = field(default_factory=dict)
    iterated: dict[str, Along] = field(default_factory=dict)
    made: dict[str, Along] = field(default_factory=dict)

    @property
    def outside(self) -> list[str]:
        """What it reads before its first turn."""
        along = [*(i.source for i in self.iterated.values()), *(m.length for m in self.made.values() if m.length)]
        trip = [self.trip] if self.trip else []
        return [*trip, *(first for first, _ in self.carried.values()), *along]

    @property
    def ends(self) -> list[str]:
        """What a turn is run for."""
        return [*(following for _, following in self.carried.values()), *(m.source for m in self.made.values())]

    def __str__(self) -> str:
        return f"loop {self.name}"


@dataclass(eq=False)
class Condition:
    """made: what an output gives, and what it takes if the condition holds and if not."""

    name: str
    condition: str = ""
    made: dict[str, tuple[str, str]] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"conditional {self.name}"


Unit: TypeAlias = Layer | Loop | Condition


@dataclass(eq=False)
class Scope:
    """Units in an order in which each comes after what it reads; `drops` is what nobody reads after each of them."""

    outer: Scope | None = None
    loop: Loop | None = None
    steps: list[Unit] = field(default_factory=list)
    drops: list[list[str]] = field(default_factory=list)

    @property
    def path(self) -> list[Scope]:
        """From the outermost to this."""
        return [*(self.outer.path if self.outer else ()), self]


def makes(unit: Unit) -> Sequence[str]:
    return unit.outputs if isinstance(unit, Layer) else tuple(unit.made)


@dataclass
class Plan:
    """The outermost scope; and by id() of a loop its turn, of a condition what it does if it holds and if not."""

    whole: Scope
    inner: dict[int, tuple[Scope, ...]]


def plan(
    layers: Iterable[Layer], loops: Sequence[Loop], conditions: Iterable[Condition], wanted: Sequence[str]
) -> Plan:
    """Places all that `wanted` needs."""
    units: list[Unit] = [*layers, *loops, *conditions]
    maker = {name: unit for unit in units for name in makes(unit)}
    of_turns = {name: loop for loop in loops for name in (*loop.carried, *loop.iterated)}
    order = _sorted(wanted, maker, of_turns)
    found = _placed(order, _within(order, maker, of_turns), wanted, of_turns)
    _drop(found, wanted)
    return found


def _reads(unit: Unit) -> list[str]:
    """All that it depends on, in it or outside."""
    if isinstance(unit, Layer):
        return [n for n in unit.inputs if n]
    if isinstance(unit, Loop):
        return [*unit.outside, *unit.ends]
    return [unit.condition, *(n for pair in unit.made.values() for n in pair)]


def _sorted(wanted: Sequence[str], maker: Mapping[str, Unit], of_turns: Mapping[str, Loop]) -> list[Unit]:
    """The units that are needed, each after those that it reads; none after the end of its own turn."""
    order, begun = list[Unit](), set[int]()

    def before(names: Iterable[str]) -> Iterator[Unit]:
        for name in names:
            # What a turn is given is there before it, as the loop's other inputs are.
            if name in of_turns:
                yield from before(of_turns[name].outside)
            elif name in maker:
                yield maker[name]

    waiting: list[tuple[Unit | None, Iterator[Unit]]] = [(None, before(wanted))]
    while waiting:
        unit, rest = waiting[-1]
        if following := next((u for u in rest if id(u) not in begun), None):
            begun.add(id(following))
            waiting.append((following, before(_reads(following))))
        else:
            order += [unit] if unit else []
            waiting.pop()
    return order


def _within(
    order: Sequence[Unit], maker: Mapping[str, Unit], of_turns: Mapping[str, Loop]
) -> dict[int, frozenset[int]]:
    """By id(), the loops in whose turns a unit lies, by theirs."""
    within = dict[int, frozenset[int]]()

    def of(name: str) -> frozenset[int]:
        if loop := of_turns.get(name):
            return within.get(id(loop), frozenset()) | {id(loop)}
        return within.get(id(maker.get(name)), frozenset())

    while True:
        before = dict(within)
        for unit in order:
            within[id(unit)] = frozenset[int]().union(*map(of, _reads(unit))) - {id(unit)}
        # What a recurrence goes on with comes after what it is read by.
        if within == before:
            return within


def _placed(
    order: Sequence[Unit], within: Mapping[int, frozenset[int]], wanted: Iterable[str], of_turns: Mapping[str, Loop]
) -> Plan:
    found = Plan(Scope(), {})
    wants = dict[str, Scope]()  # the innermost scope that all readers of a tensor lie in

    def want(name: str, scope: Scope) -> None:
        if name not in of_turns:
            both = zip(wants.get(name, scope).path, scope.path, strict=False)
            wants[name] = [a for a, b in both if a is b][-1]

    for name in wanted:
        want(name, found.whole)
    for unit in reversed(order):
        scope, own = found.whole, [wants[n] for n in makes(unit) if n in wants]
        shared = [steps[0] for steps in zip(*(s.path for s in own), strict=False) if len({*map(id, steps)}) == 1]
        # It stays before a loop that it does not depend on.
        for inner in shared[1:]:
            if inner.loop and id(inner.loop) not in within[id(unit)]:
                break
            scope = inner
        scope.steps.append(unit)
        inside: tuple[Scope, ...] = ()
        if isinstance(unit, Layer):
            reads = [(n, scope) for n in _reads(unit)]
        elif isinstance(unit, Loop):
            inside = (Scope(scope, unit),)
            reads = [(n, scope) for n in unit.outside] + [(n, inside[0]) for n in unit.ends]
        else:
            inside = (Scope(scope), Scope(scope))
            reads = [(n, branch) for pair in unit.made.values() for n, branch in zip(pair, inside, strict=True)]
            reads.append((unit.condition, scope))
        found.inner[id(unit)] = inside
        for name, reader in reads:
            want(name, reader)
    return found


def _drop(found: Plan, kept: Iterable[str]) -> None:
    """Puts the steps in order, and says after which of them a tensor is read no more."""
    last = dict[str, tuple[Scope, int]]()
    stays = {*kept}

    def walk(scope: Scope, above: list[tuple[Scope, int]]) -> None:
        scope.steps.reverse()
        scope.drops = [[] for _ in scope.steps]
        for place, unit in enumerate(scope.steps):
            here = [*above, (scope, place)]
            for name in makes(unit):
                last[name] = scope, place
            for inner in found.inner[id(unit)]:
                walk(inner, here)
            for name in _reads(unit):
                # The step of the scope that makes it, in which this reader lies.
                at = next((s for s in here if name in last and s[0] is last[name][0]), None)
                if at:
                    last[name] = at
                else:
                    # A turn ends with it.
                    stays.add(name)

    walk(found.whole, [])
    for name, (scope, place) in last.items():
        if name not in stays:
            scope.drops[place].append(name)
