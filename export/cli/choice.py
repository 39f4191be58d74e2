"""A choice among the words of another module, which a command imports only when it works with them."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import click


class ChoiceOf(click.Choice):  # type: ignore[type-arg]
    """One of the words in a module's tuple, or of the keys of its mapping, by the names of both."""

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name
        super().__init__(())

    @property
    def choices(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(getattr(importlib.import_module(self._module), self._name))

    @choices.setter
    def choices(self, choices: Iterable[Any]) -> None:
        """Click sets what it was given, which is nothing."""
