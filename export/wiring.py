"""Puts blocks at their places in a graph, and names the values between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from llmexport.export.spec import ONLY, Assembly, Block, Graph, Port, Step

# What a state's value is called before a step and after it, by the start of its port's name.
PREFIXES = {"past_": "past_key_values", "present_": "present"}


class Wiring:
    """A graph under construction.

    A port of a placed block reads, in this order: the value that is given for it by name; a state; an output of
    the shared blocks in its `context`; the input or earlier output that is called like it. Nothing is read
    before it is made.
    """

    def __init__(self, name: str = ONLY) -> None:
        self._name = name
        self._inputs: dict[str, Port] = {}
        self._past: dict[str, Port] = {}
        self._steps: list[Step] = []
        self._outputs: dict[str, Port] = {}
        self._present: dict[str, Port] = {}
        self._carried: dict[str, str] = {}
        self._shared: dict[Block, Step] = {}
        self._made: set[str] = set()

    def take(self, *ports: Port) -> None:
        """Adds inputs of the graph."""
        self._inputs |= {p.name: p for p in ports}
        self._made |= {p.name for p in ports}

    def give(self, *ports: Port) -> None:
        """Adds outputs of the graph: values made so far, by name."""
        self._check("give", [p.name for p in ports])
        self._outputs |= {p.name: p for p in ports}

    def share(self, blocks: Iterable[Block]) -> None:
        """Places blocks that others have as context, each once; a second of a kind without a label is numbered."""
        for block in dict.fromkeys(blocks):
            twins = sum(b.label == block.label for b in self._shared)
            suffix = block.label.removeprefix(block.kind) + (f"_{twins}" if twins else "")
            kept = {s.present for s in block.states}
            gives = [p.name + suffix for p in block.outputs if p not in kept]
            self.place(block.kind + suffix, block, gives, state=block.kind + suffix)
            self._shared[block] = self._steps[-1]

    def place(
        self,
        name: str,
        block: Block,
        gives: Iterable[str] = (),
        *,
        state: str = "",
        context: Iterable[Block] = (),
        path: str | None = None,
        **given: str,
    ) -> tuple[str, ...]:
        """Places one block and returns the names of its outputs that are no states.

        `gives` names those outputs in order (else they are called like the ports); `state` is the place of its
        states among those of the graph, as "3"; `path` is where its parameters start, `{name}.` if None. Raises
        KeyError if it reads what nothing before it makes, or makes a value that there is.
        """
        past = {s.past.name: _state_name(s.past, state) for s in block.states}
        present = {s.present.name: _state_name(s.present, state) for s in block.states}
        for s in block.states:
            before, after = past[s.past.name], present[s.present.name]
            self._past[before] = dataclasses.replace(s.past, name=before)
            self._present[after] = dataclasses.replace(s.present, name=after)
            self._carried[before] = after
        self._made |= set(past.values())
        shared: dict[str, str] = {}
        for port, value in (pair for b in dict.fromkeys(context) for pair in self._outputs_of(b)):
            if port.name in shared:
                raise KeyError(f"{self._name}: two blocks of the context of {name} give {port.name}")
            shared[port.name] = value
        reads = {p.name: p.name for p in block.inputs} | shared | past | given
        self._check(name, [reads[p.name] for p in block.inputs])
        others = [p.name for p in block.outputs if p.name not in present]
        named = present | dict(zip(others, [*gives] or others, strict=True))
        if twice := self._made & set(named.values()):
            raise KeyError(f"{self._name}: {name} makes {', '.join(sorted(twice))} again")
        self._made |= set(named.values())
        inputs, outputs = (reads[p.name] for p in block.inputs), (named[p.name] for p in block.outputs)
        self._steps.append(Step(name, block, tuple(inputs), tuple(outputs), f"{name}." if path is None else path))
        return tuple(named[n] for n in others)

    def done(self) -> Graph:
        """The graph: its inputs, then past states; its outputs, then present states."""
        inputs, outputs = {**self._inputs, **self._past}, {**self._outputs, **self._present}
        assembly = Assembly(tuple(inputs.values()), tuple(self._steps), tuple(outputs.values()))
        return Graph(self._name, assembly, dict(self._carried))

    def _outputs_of(self, block: Block) -> Iterable[tuple[Port, str]]:
        return zip(block.outputs, self._shared[block].outputs, strict=True)

    def _check(self, name: str, values: Iterable[str]) -> None:
        if missing := [v for v in values if v not in self._made]:
            raise KeyError(f"{self._name}: {name} reads {', '.join(missing)}, which nothing before it makes")


def _state_name(port: Port, place: str) -> str:
    """The name that people know: `past_key` at place 3 is past_key_values.3.key, `present_key` is present.3.key."""
    prefix = next(p for p in PREFIXES if port.name.startswith(p))
    return f"{PREFIXES[prefix]}.{place}.{port.name.removeprefix(prefix)}"
