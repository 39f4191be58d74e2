"""Single values from a file that nobody vouches for: checked, and shown."""

from __future__ import annotations

import math
import reprlib
from typing import Any

from llmexport.export.errors import ExportError

INT32_MAX = 2**31 - 1  # ops count tokens in int32
LONGEST, TAIL, MOST_LINES = 2000, 500, 60  # characters of a line that is shown, of its end, lines of a message
LONGEST_KEY = 80
SMALL, LARGE = 1e-30, 1e30  # what lies beyond leaves fp32 with the next product


def show(value: Any) -> str:
    """A value from a file, on one line and cut in length and depth."""
    return reprlib.repr(value)


def visible(text: str) -> str:
    """Text as one line that a terminal or a page may get, cut in length: what does not print is escaped.

    That is what isprintable() says: control characters, newlines of every kind, marks that turn the direction of
    writing, halves of characters.
    """
    if len(text) > LONGEST:
        # The end of a message is what to do.
        text = f"{text[: LONGEST - TAIL]}... ({len(text) - LONGEST} characters more) ...{text[-TAIL:]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def message(text: str) -> str:
    """A message as a terminal may get it: no line but its first begins at the margin.

    It has more lines only where we have put them: a line of ours, then what a program said, two spaces in.
    """
    first, *said = text.split("\n  ", 1)
    told = said[0].splitlines() if said else []
    more = [f"... ({len(told) - MOST_LINES} lines more)"] if len(told) > MOST_LINES else []
    return "\n  ".join(map(visible, [first, *told[:MOST_LINES], *more]))


def one_line(said: object) -> str:
    """What an error of somebody else says, on one line."""
    return " ".join(str(said).split())


def finite(data: Any) -> Any:
    """The same data for JSON, which has no word for a float that is not finite: as text."""
    if isinstance(data, dict):
        return {k: finite(v) for k, v in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(v) for v in data]
    return str(data) if isinstance(data, float) and not math.isfinite(data) else data


_names = reprlib.Repr()
_names.maxstring = 120


def show_name(name: Any) -> str:
    """A name from a file, or a list of such, whole where they are of a length that names have."""
    return _names.repr(name)


def key_name(key: str) -> str:
    return key if key.isidentifier() and len(key) <= LONGEST_KEY else show(key)


def whole(value: Any) -> Any:
    """A float without a fraction as the integer that was meant; anything else as it is."""
    return int(value) if type(value) is float and value.is_integer() else value


def same(value: Any, other: Any) -> bool:
    """Whether two values of a config are equal; true is not 1, but 1.0 is."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def as_integer(key: str, value: Any, least: int = 1, most: int = INT32_MAX) -> int:
    number = whole(value)
    if type(number) is not int or number < least:
        kind = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ExportError(f"config.json: {key} is {show(value)}, expected {kind}")
    if number > most:
        raise ExportError(f"config.json: {key} is {show(value)}, at most {most} is supported")
    return number


def as_positive(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ExportError(f"config.json: {key} is {show(value)}, expected a positive number")
    if not SMALL <= value <= LARGE:
        raise ExportError(f"config.json: {key} is {show(value)}, expected a number from {SMALL} to {LARGE}")
    return float(value)
