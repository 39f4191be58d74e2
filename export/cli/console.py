"""What commands say, and how: progress on stderr, results on stdout, JSON for scripts."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from llmexport.export import interrupt
from llmexport.export.values import finite, visible
from llmexport.plugins.errors import UserError

F = TypeVar("F", bound=Callable[..., Any])
BAR = 24


class Console:
    """Says nothing if `quiet`, and only JSON on stdout if `as_json`."""

    def __init__(self, quiet: bool = False, as_json: bool = False) -> None:
        # Before the work, not after it.
        if sys.stdout is None and (as_json or not quiet):
            raise ConsoleError("stdout is closed, and the result is printed there: pass --quiet without --json")
        self.quiet = quiet
        self.as_json = as_json
        self._live = sys.stderr is not None and sys.stderr.isatty() and not quiet
        self._last = ""
        self._mute = False  # once stderr takes no more
        if quiet:
            import logging

            logging.getLogger("llmexport").setLevel(logging.ERROR)

    def progress(self, what: str, done: int, of: int) -> None:
        """A bar on a terminal, one plain line a step otherwise."""
        interrupt.check()
        what = visible(what)
        if self._live:
            full = BAR * done // max(of, 1)
            self._beside(f"\r\x1b[K{'█' * full}{'░' * (BAR - full)} {what}", nl=False)
            if done >= of:
                self._beside("\r\x1b[K", nl=False)
        elif done < of and what != self._last:
            self._last = what
            self._beside(f"{what} ({done + 1}/{of})")

    def say(self, text: str) -> None:
        if not self.quiet and not self.as_json:
            _print(visible(text))

    def write(self, text: str) -> None:
        """A piece of text as it is, but for what commands a terminal."""
        if self.quiet or self.as_json or not text:
            return
        if sys.stdout.isatty():
            text = "".join(c if c.isprintable() or c in "\n\t" else visible(c) for c in text)
        _print(text, nl=False)

    def notes(self, sentences: Sequence[str]) -> None:
        """What the result is not, or is only so far, that no error stops."""
        for sentence in sentences:
            self._beside(f"note: {visible(sentence)}")

    def _beside(self, text: str, nl: bool = True) -> None:
        """To stderr. One that is full or has no reader costs what it would have said, not the work."""
        if self.quiet or self._mute:
            return
        try:
            click.echo(text, nl=nl, err=True)
        except OSError:
            self._mute = True

    def lines(self, sentences: Sequence[str]) -> None:
        """Sentences, each on a line of its own however long, so that what they quote is not cut."""
        for sentence in sentences:
            self.say(sentence)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A titled table; no columns, no header."""
        if self.quiet or self.as_json:
            return
        from llmexport.export.cli.table import table

        width, bold = 100, False
        if sys.stdout.isatty():
            import shutil

            width, bold = shutil.get_terminal_size().columns, os.environ.get("TERM") != "dumb"
        shown = [[*map(visible, row)] for row in rows]
        _print(table(visible(title), columns, shown, width, bold), nl=False)

    def result(self, data: Any) -> None:
        """The command's result, for scripts; a function gives it where it takes time to make."""
        if self.as_json:
            data = data() if callable(data) else data
            _print(json.dumps(finite(data), indent=1, allow_nan=False))


class ConsoleError(UserError):
    """The result cannot be printed."""


def _print(text: str, nl: bool = True) -> None:
    try:
        click.echo(text, nl=nl)
    except OSError as error:
        raise ConsoleError(f"the work is done, but its result cannot be printed to stdout: {error.strerror}") from error


def talkative(command: F) -> F:
    """The options --quiet and --json, which every command has."""
    command = click.option("--quiet", "-q", is_flag=True, help="Print errors only.")(command)
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(command)


def size(nbytes: float) -> str:
    """Bytes for people, in powers of 1000."""
    if nbytes < 1000:
        return f"{nbytes:.0f} B"
    power = min((len(str(int(nbytes))) - 1) // 3, 4)
    return f"{nbytes / 1000**power:.1f} {'kMGT'[power - 1]}B"
