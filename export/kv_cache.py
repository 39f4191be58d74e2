"""The keys and values that a decoder carries, as other runtimes describe them: one shape, and a name with %d for the
number of the layer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from llmexport.export.errors import ExportError
from llmexport.export.spec import Graph, State, Step

_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class KvCache:
    """`past` and `present` name the keys, then the values. layers: those of the model, with any that keep none.
    others: the names of what else is carried. slots: of a cache that is written in place; None if it grows."""

    past: tuple[str, str]
    present: tuple[str, str]
    heads: int
    head_size: int
    layers: int
    others: tuple[str, ...]
    slots: int | None


def kv_cache(graph: Graph) -> KvCache:
    """The cache of a graph. Raises ExportError unless all layers that have one have the same, of keys and values."""
    layers = [s for s in graph.assembly.steps if s.block.states]
    kept = [(s, tuple(t for t in s.block.states if _by_token(t))) for s in layers]
    if any(t.past.use == "window" for _, states in kept for t in states):
        raise ExportError(
            "whose static cache keeps the last tokens alone in some layers (as without --window-slots all)"
        )
    kinds: set[tuple[Any, ...]] = {(_names(s, states), *(t.past.shape for t in states)) for s, states in kept if states}
    if len(kinds) != 1:
        raise ExportError("whose layers keep keys and values of different shapes" if kinds else "which keeps no keys")
    [((past, present), shape, *more)] = kinds
    if any(other != shape for other in more):
        raise ExportError("which keeps a latent of each token and no values of the shape of keys")
    numbers = [int(found[1]) for name in graph.carried if (found := _LAYER.search(name))]
    others = {_pattern(s.reads[t.past.name]) for s in layers for t in s.block.states if not _by_token(t)}
    _, heads, tokens, size = shape
    slots = tokens if isinstance(tokens, int) else None
    return KvCache(past, present, int(heads), int(size), 1 + max(numbers), tuple(sorted(others)), slots)


def _by_token(state: State) -> bool:
    """Whether it keeps something of each token."""
    return state.past.shape != state.present.shape or state.past.use in ("slots", "window")


def _names(step: Step, states: tuple[State, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    past = tuple(_pattern(step.reads[s.past.name]) for s in states)
    return past, tuple(_pattern(step.makes[s.present.name]) for s in states)


def _pattern(name: str) -> str:
    return _LAYER.sub(".%d.", name)
