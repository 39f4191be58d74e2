"""The keys and values that a decoder carries, as other runtimes describe them: one shape, and a name with %d for the
number of the layer."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmexport.export.errors import ExportError
from llmexport.export.spec import Graph, State, Step

_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class KvCache:
    """`past` and `present` name the keys, then the values. layers: those of the model, with any that keep none.
    others: the names of what else is carried."""

    past: tuple[str, str]
    present: tuple[str, str]
    heads: int
    head_size: int
    layers: int
    others: tuple[str, ...]


def kv_cache(graph: Graph) -> KvCache:
    """The cache of a graph, which grows along the third of its four axes. Raises ExportError unless it is like that."""
    layers = [s for s in graph.assembly.steps if s.block.states]
    grown = [(s, tuple(t for t in s.block.states if _grows(t))) for s in layers]
    kinds = {(_names(s, states), *(t.past.shape for t in states)) for s, states in grown if states}
    if not kinds:
        raise ExportError("its keys and values do not grow with the text")
    if len(kinds) > 1:
        raise ExportError("its layers keep keys and values of different shapes")
    [((past, present), shape, *_)] = kinds
    numbers = [int(found[1]) for name in graph.carried if (found := _LAYER.search(name))]
    others = {_pattern(s.reads[t.past.name]) for s in layers for t in s.block.states if not _grows(t)}
    return KvCache(past, present, int(shape[1]), int(shape[3]), 1 + max(numbers), tuple(sorted(others)))


def _grows(state: State) -> bool:
    return state.past.shape != state.present.shape


def _names(step: Step, states: tuple[State, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    past = tuple(_pattern(step.reads[s.past.name]) for s in states)
    return past, tuple(_pattern(step.makes[s.present.name]) for s in states)


def _pattern(name: str) -> str:
    return _LAYER.sub(".%d.", name)
