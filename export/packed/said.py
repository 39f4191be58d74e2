"""A quantization_config as it is read: each key as what it must be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmexport.export.errors import ExportError
from llmexport.export.values import show


@dataclass(frozen=True)
class Said:
    """The keys of a quantization_config, or of a part of one, each read as what it must be; `what` describes the whole.

    Raises ExportError on another.
    """

    data: Mapping[str, Any]
    where: str
    what: str

    def wrong(self, key: str, expected: str) -> ExportError:
        return ExportError(
            f"{self.where}: {key} of its quantisation ({self.what}) is {show(self.data.get(key))}, expected {expected}"
        )

    def choice(self, key: str, choices: tuple[Any, ...]) -> Any:
        """One of these; the first where nothing is said."""
        found = self.data.get(key, choices[0])
        if not any(found is c or (found == c and type(found) is type(c)) for c in choices):
            raise self.wrong(key, " or ".join(map(str, choices)))
        return found

    def size(self, key: str) -> int | None:
        """A group's size; None where a row is one group."""
        found = self.data.get(key)
        if found in (None, -1):
            return None
        if type(found) is not int or found < 1:
            raise self.wrong(key, "a number of columns, or -1")
        return found

    def flag(self, key: str, absent: bool) -> bool:
        return bool(self.choice(key, (absent, not absent)))

    def names(self, key: str) -> tuple[str, ...]:
        found = self.data.get(key)
        if found is None:
            return ()
        if not isinstance(found, list) or not all(isinstance(n, str) for n in found):
            raise self.wrong(key, "names of modules")
        return tuple(found)

    def block(self, key: str) -> tuple[int, int] | None:
        found = self.data.get(key)
        if found is None:
            return None
        if not isinstance(found, list) or len(found) != 2 or any(type(n) is not int or n < 1 for n in found):
            raise self.wrong(key, "two numbers, of rows and columns")
        return found[0], found[1]
