"""Reads `config.json` so that no key that can change the numbers is passed over in silence."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from llmexport.export import quantised, rope
from llmexport.export.errors import ExportError
from llmexport.export.keys import (
    ANY,
    CAUSAL,
    EQUAL,
    HARMLESS_STARTS,
    NEUTRAL,
    NEUTRAL_CAUSAL,
    NEUTRAL_ENCODER,
    NOT_NULL,
    QUANTISATION,
    SWITCHED,
)
from llmexport.export.packed.scheme import KEYS, method_of, said_in
from llmexport.export.spec import Splice
from llmexport.export.static import StaticCache
from llmexport.export.values import as_integer, as_positive, key_name, same, show, visible, whole

_REQUIRED = object()
# Far beyond any published model, and small enough that the bytes of no weight overflow 64 bits.
LONGEST, MOST = 2**20, 4096


class Config:
    """The keys of one `config.json`, each read once by name; `finish` refuses those that nobody read.

    `notes` are sentences for who exports: what is passed over, and where the graph is right all the same. `static`
    is what a static cache keeps, which no config says; `splice` is what puts pictures into the text, if anything does.
    """

    def __init__(
        self, data: Mapping[str, Any], static: StaticCache | None = None, splice: Splice | None = None
    ) -> None:
        self.static, self.splice = static, splice
        self._data = dict(data)
        self._read: set[str] = set()
        self.notes: list[str] = []

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value of a key, or `default` where there is none. Null reads as None where that is the default."""
        self._read.add(key)
        value = self._data.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ExportError(f"config.json has no {key!r}: is it the config of a whole checkpoint?")
        if default is not None and key in self._data:
            raise ExportError(f"config.json: {key} is null, which means nothing here: write its value")
        return default

    def has(self, key: str) -> bool:
        return self._data.get(key) is not None

    def either(self, *keys: str) -> str:
        """Which of these keys, which all say one thing, the config has; the first if it has none."""
        self._read.update(keys)
        said = [k for k in keys if self.has(k)] or [keys[0]]
        for other in said[1:]:
            if not same(self._data[said[0]], self._data[other]):
                found = f"{said[0]} {show(self._data[said[0]])} and {other} {show(self._data[other])}"
                raise ExportError(f"config.json says {found}, which are one thing: which of them is right?")
        return said[0]

    def leave(self, keys: Iterable[str]) -> None:
        """Passes over keys that change nothing in this architecture, whatever they hold."""
        self._read.update(keys)

    def window(self, key: str, absent: int | None) -> int | None:
        """An attention window in tokens; null means none, and a config without the key means `absent`."""
        self._read.add(key)
        if self._data.get(key, absent) is None:
            return None
        return self.integer(key, absent)

    def cap(self, key: str, absent: float) -> float:
        """A bound on logits; null means none, which is 0, and a config without the key means `absent`."""
        self._read.add(key)
        return 0.0 if self._data.get(key, absent) is None else self.number(key, absent)

    def integer(self, key: str, default: Any = _REQUIRED, least: int = 1) -> int:
        return as_integer(key, self.get(key, default), least)

    def length(self, key: str, default: Any = _REQUIRED) -> int:
        """The size of a dimension of a weight."""
        return as_integer(key, self.get(key, default), most=LONGEST)

    def length_or_none(self, key: str, absent: int | None) -> int | None:
        """The size of a dimension that null does without; a config without the key means `absent`."""
        self._read.add(key)
        return None if self._data.get(key, absent) is None else self.length(key, absent)

    def side(self, key: str, default: Any = _REQUIRED) -> int:
        """The size of all sides of a picture or a patch, which may be listed if they are equal."""
        found = self.get(key, default)
        equal = isinstance(found, list) and found and all(same(n, found[0]) for n in found)
        return as_integer(key, found[0] if equal else found, most=LONGEST)

    def count(self, key: str, default: Any = _REQUIRED, least: int = 1) -> int:
        """How many layers, heads, experts or the like there are."""
        return as_integer(key, self.get(key, default), least, most=MOST)

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """A positive number."""
        return as_positive(key, self.get(key, default))

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key, default)
        if type(value) is not bool:
            raise ExportError(f"config.json: {key} is {show(value)}, expected true or false")
        return value

    def choice(self, key: str, choices: Mapping[str, Any], default: Any = _REQUIRED) -> Any:
        """What `choices` says of the value; refuses any other value."""
        value = self.get(key, default)
        if not isinstance(value, str) or value not in choices:
            known = ", ".join(map(repr, choices))
            raise ExportError(f"config.json: {key} is {show(value)}, this architecture knows {known}")
        return choices[value]

    def expect(self, key: str, *values: Any) -> None:
        """Refuses a value other than those that this architecture's blocks are written for."""
        self._read.add(key)
        found = self._data.get(key, values[0])
        if not any(same(found, v) for v in values):
            raise ExportError(f"config.json: {key} is {show(found)}, only {show(values[0])} is supported here")

    def expect_code(self, known: Mapping[str, str]) -> None:
        """Refuses a checkpoint that brings other code than the architecture's; no code of a checkpoint is ever run.

        `known` is what its auto_map says, by the classes of transformers.
        """
        found = self.get("auto_map", {})
        # A model that was loaded from the hub and saved names the repository of its code too, before `--`.
        if not isinstance(found, dict) or any(known.get(k) != str(v).rpartition("--")[2] for k, v in found.items()):
            code = " and ".join(dict.fromkeys(v.partition(".")[0] for k, v in known.items() if "Tokenizer" not in k))
            raise ExportError(f"config.json: auto_map is {show(found)}, only the code of {code} is supported here")

    def layer_types(self, choices: Mapping[str, Any], derived: Sequence[str]) -> tuple[Any, ...]:
        """What `choices` says of every layer's kind; `derived` are the kinds where the config does not list them."""
        layers, kinds = self.count("num_hidden_layers"), self.get("layer_types", None)
        kinds = list(derived) if kinds is None else kinds
        if not isinstance(kinds, list) or len(kinds) != layers:
            raise ExportError(f"config.json: layer_types must list {layers} kinds of attention, found {show(kinds)}")
        unknown = sorted({str(k) for k in kinds} - choices.keys())
        if unknown:
            raise ExportError(
                f"config.json: layer_types names {', '.join(map(visible, unknown))}, known are {', '.join(choices)}"
            )
        return tuple(choices[k] for k in kinds)

    def expect_layer_types(self, kinds: Sequence[str]) -> None:
        """Refuses layer_types that are not `kinds`, unless the architecture has read them itself."""
        found = self._data.get("layer_types")
        if "layer_types" in self._read or found is None:
            return
        self._read.add("layer_types")
        if found != list(kinds):
            known = ", ".join(dict.fromkeys(kinds))
            raise ExportError(
                f"config.json: layer_types is {show(found)}, all {len(kinds)} layers are {known} in this architecture"
            )

    def layer_set(self, key: str, default: Sequence[int]) -> frozenset[int]:
        """A list of layers by number."""
        layers, found = self.count("num_hidden_layers"), self.get(key, None)
        found = list(default) if found is None else found
        numbers: list[Any] = [whole(i) for i in found] if isinstance(found, list) else [None]
        if any(type(i) is not int or not 0 <= i < layers for i in numbers):
            raise ExportError(f"config.json: {key} is {show(found)}, expected numbers of layers from 0 to {layers - 1}")
        return frozenset(numbers)

    def of_layers(self, layers: Collection[int], known: Collection[str]) -> Config | None:
        """What per_layer_config says of these layers, of which some keys are `known`; None if it is not there.

        transformers writes there what differs from the keys beside it. Raises ExportError unless it speaks of these
        layers alone, and of all alike.
        """
        found = self.get("per_layer_config", None)
        if found is None:
            return None
        each = list(found.values()) if isinstance(found, dict) else []
        numbers = {str(k).lstrip("0") or "0" for k in found} if each else set()
        alike = all(isinstance(e, dict) and e.keys() <= {*known} and e == each[0] for e in each)
        if numbers != set(map(str, layers)) or len(each) != len(numbers) or not alike:
            raise ExportError(
                f"config.json: per_layer_config is {show(found)}, expected {' and '.join(known)} of layers "
                f"{', '.join(map(str, layers))}, one for all"
            )
        return Config(each[0])

    rotary = rope.read

    def finish(self, *, causal: bool) -> None:
        """Raises ExportError if a key that could change the numbers was never read.

        `causal`: the model is a decoder, else an encoder.
        """
        unread = sorted(k for k in self._data if not self._says_nothing(k, causal))
        if (said := said_in(self._data)) and method_of(said):
            # What it says is held against the tensors.
            unread = [k for k in unread if k not in KEYS]
        for key in (k for k in QUANTISATION if k in unread):
            raise quantised.refusal(f"config.json: {key}", quantised.describe(self._data[key]))
        if unread:
            keys = ", ".join(f"{key_name(k)}={show(self._data[k])}" for k in unread)
            raise ExportError(
                f"config.json has keys that this architecture does not understand: {keys}. "
                "Exporting without them could give a wrong model: report the checkpoint, so that they are read here"
            )

    def _says_nothing(self, key: str, causal: bool) -> bool:
        """Whether a key was read, or cannot change what is exported."""
        value = self._data[key]
        if key in self._read or key in ANY or key.startswith(HARMLESS_STARTS) or (causal and key in CAUSAL):
            return True
        if value is None and key not in NOT_NULL:
            return True
        if key in EQUAL and EQUAL[key] in self._read:
            return same(value, self._data.get(EQUAL[key]))
        if key in SWITCHED and self._data.get(SWITCHED[key]) is False:
            # The cache of transformers slides by the window of any config whose class does not read the switch.
            return key != "sliding_window" or SWITCHED[key] in self._read
        if key in SWITCHED.values() and value is False:
            # Who reads a window without its switch has one all the same, unless it is null.
            switched = [k for k, switch in SWITCHED.items() if switch == key]
            return all(k not in self._read or self._data.get(k, ...) is None for k in switched)
        own = NEUTRAL_CAUSAL if causal else NEUTRAL_ENCODER
        return any(same(value, v) for v in (*NEUTRAL.get(key, ()), *own.get(key, ())))
