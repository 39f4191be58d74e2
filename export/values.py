"""Single values from a file that nobody vouches for: checked, and shown."""

from __future__ import annotations

import reprlib
from typing import Any

from llmexport.export.errors import ExportError


def show(value: Any) -> str:
    """A value from a file, on one line and cut in length and depth."""
    return reprlib.repr(value)


def key_name(key: str) -> str:
    return key if key.isidentifier() else show(key)


def as_integer(key: str, value: Any, least: int = 1) -> int:
    if type(value) is not int or not least <= value < 2**63:
        kind = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ExportError(f"config.json: {key} is {show(value)}, expected {kind}")
    return value


def as_positive(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300:
        raise ExportError(f"config.json: {key} is {show(value)}, expected a positive number")
    return float(value)
