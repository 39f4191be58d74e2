"""A network of TensorRT's, read once and computed for any number of feeds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from llmexport.export.network import layers, scopes
from llmexport.export.network.kinds import Array, Compute, Unable, named, scalar
from llmexport.export.network.layers import Layer, Stored
from llmexport.export.network.scopes import Along, Condition, Loop, Scope, Unit

Values = dict[str, Array]
# Of a loop's output: whether it is of all turns, and whether the last comes first.
OUTPUTS = {"LAST_VALUE": (False, False), "CONCATENATE": (True, False), "REVERSE": (True, True)}


class Program:
    """What a network computes; its weights are where TensorRT has them, for as long as its parser lives. `stored` gives
    those that TensorRT's Python has no arrays of.

    Raises Unable on a layer, an attribute or a type that is not known here, of any layer.
    """

    def __init__(self, trt: Any, network: Any, stored: Stored) -> None:
        self._trt, self._stored = trt, stored
        self._functions: dict[Layer, Compute] = {}
        # By TensorRT's object, which has no other identity.
        self._loops: dict[Any, Loop] = {}
        self._conditions: dict[Any, Condition] = {}
        for i in range(network.num_layers):
            self._read(network.get_layer(i))
        self.outputs = [network.get_output(i).name for i in range(network.num_outputs)]
        constants = [x for x in self._functions if x.kind == "CONSTANT"]
        self._constants: Values = {x.outputs[0]: self._functions.pop(x)()[0] for x in constants}
        loops, conditions = [*self._loops.values()], [*self._conditions.values()]
        for loop in loops:
            if loop.condition and loop.condition not in loop.carried:
                raise Unable(f"{loop} goes on while {loop.condition}, known here are recurrences alone")
        self._plan = scopes.plan([*self._functions], loops, conditions, self.outputs)

    def run(self, feed: Mapping[str, Array]) -> Values:
        """The outputs, by name. Raises Unable where a layer cannot be computed."""
        values = self._constants | dict(feed)
        with np.errstate(all="ignore"):
            self._scope(self._plan.whole, values)
        return {name: values[name] for name in self.outputs}

    def apart(self, feed: Mapping[str, Array], known: Mapping[str, Array]) -> tuple[Values, dict[str, str]]:
        """What each layer outside loops and branches makes of what is `known` of its inputs, so that no error adds up;
        and which layer that is. Of tensors that are not known, what was made here is read."""
        values, made, who = self._constants | dict(feed), Values(), dict[str, str]()

        def note(unit: Unit) -> None:
            for name in scopes.makes(unit):
                if name in known:
                    made[name], values[name], who[name] = values[name], known[name], str(unit)

        with np.errstate(all="ignore"):
            self._scope(self._plan.whole, values, note)
        return made, who

    def _read(self, raw: Any) -> None:
        name = f"layer {raw.name} ({raw.type.name})"
        try:
            self._place(layers.of(self._trt, raw), raw)
        except Exception as error:
            raise Unable(f"{name}: {error}") from error

    def _place(self, layer: Layer, raw: Any) -> None:
        inputs, output = layer.inputs, layer.outputs[0] if layer.outputs else ""
        match layer.kind:
            case "TRIP_LIMIT":
                limit = named("limit", {"COUNT": "trip", "WHILE": "condition"}, raw.kind)
                setattr(self._loop(raw), limit, inputs[0])
            case "RECURRENCE":
                self._loop(raw).carried[output] = inputs[0], inputs[1]
            case "ITERATOR":
                self._loop(raw).iterated[output] = Along(inputs[0], raw.axis, raw.reverse)
            case "LOOP_OUTPUT":
                every, back = named("output", OUTPUTS, raw.kind)
                made = Along(inputs[0], raw.axis, back, inputs[1]) if every else Along(inputs[0], None)
                self._loop(raw).made[output] = made
            case "CONDITION":
                self._condition(raw).condition = inputs[0]
            case "CONDITIONAL_OUTPUT":
                self._condition(raw).made[output] = inputs[0], inputs[1]
            case _:
                self._functions[layer] = layers.function(self._trt, layer, raw, self._stored)

    def _loop(self, raw: Any) -> Loop:
        return self._loops.setdefault(raw.loop, Loop(raw.loop.name))

    def _condition(self, raw: Any) -> Condition:
        return self._conditions.setdefault(raw.conditional, Condition(raw.conditional.name))

    def _scope(self, scope: Scope, values: Values, note: Callable[[Unit], None] = lambda unit: None) -> None:
        for unit, drops in zip(scope.steps, scope.drops, strict=True):
            if isinstance(unit, Layer):
                made = self._functions[unit](*(values[n] if n else None for n in unit.inputs))
                values.update(zip(unit.outputs, made, strict=True))
            elif isinstance(unit, Loop):
                self._turns(unit, values)
            else:
                holds = bool(np.all(values[unit.condition]))
                self._scope(self._plan.inner[id(unit)][0 if holds else 1], values)
                values.update({name: values[pair[0 if holds else 1]] for name, pair in unit.made.items()})
            note(unit)
            for name in drops:
                values.pop(name, None)

    def _turns(self, loop: Loop, values: Values) -> None:
        [turn], most = self._plan.inner[id(loop)], scalar(values[loop.trip]) if loop.trip else sys.maxsize
        state = {name: values[first] for name, (first, _) in loop.carried.items()}
        gathered: dict[str, list[Array]] = {name: [] for name in loop.made}
        turns = 0
        while turns < most and (not loop.condition or state[loop.condition].all()):
            values |= state
            for name, (source, axis, back, _) in loop.iterated.items():
                x = values[source]
                assert axis is not None
                if turns >= x.shape[axis]:
                    raise Unable(f"{loop} makes more turns than the {x.shape[axis]} entries of {source}")
                values[name] = np.take(x, x.shape[axis] - 1 - turns if back else turns, axis)
            self._scope(turn, values)
            for name, made in loop.made.items():
                if made.axis is not None:
                    gathered[name].append(values[made.source])
            state = {name: values[following] for name, (_, following) in loop.carried.items()}
            turns += 1
        # A recurrence that is read after the loop has gone on once more.
        values |= state
        for name, made in loop.made.items():
            if made.axis is None:
                values[name] = values[made.source]
                continue
            if not turns or scalar(values[made.length]) != turns:
                raise Unable(f"{loop} makes {turns} turns, and {scalar(values[made.length])} entries of {name}")
            values[name] = np.stack(gathered[name][:: -1 if made.back else 1], made.axis)
