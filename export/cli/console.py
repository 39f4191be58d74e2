"""What commands say, and how: progress on stderr, results on stdout, JSON for scripts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])
BAR = 24


class Console:
    """Says nothing if `quiet`, and only JSON on stdout if `as_json`."""

    def __init__(self, quiet: bool = False, as_json: bool = False) -> None:
        self.quiet = quiet
        self.as_json = as_json
        self._live = sys.stderr.isatty() and not quiet
        self._last = ""

    def progress(self, what: str, done: int, of: int) -> None:
        """A bar on a terminal, one plain line a step otherwise."""
        if self.quiet:
            return
        if self._live:
            full = BAR * done // max(of, 1)
            click.echo(f"\r\x1b[K{'█' * full}{'░' * (BAR - full)} {what}", nl=False, err=True)
            if done >= of:
                click.echo("\r\x1b[K", nl=False, err=True)
        elif done < of and what != self._last:
            self._last = what
            click.echo(f"{what} ({done + 1}/{of})", err=True)

    def say(self, text: str) -> None:
        if not self.quiet and not self.as_json:
            click.echo(text)

    def lines(self, sentences: Sequence[str]) -> None:
        """Sentences, each on a line of its own however long, so that what they quote is not cut."""
        for sentence in sentences:
            self.say(sentence)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A titled table; no columns, no header."""
        if self.quiet or self.as_json:
            return
        from rich import box
        from rich.console import Console as Terminal
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, show_header=bool(columns), show_edge=False, pad_edge=False)
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*row)
        terminal = Terminal(width=None if sys.stdout.isatty() else 100, highlight=False, markup=False)
        terminal.print(title, style="bold")
        terminal.print(table)
        terminal.print()

    def result(self, data: Any) -> None:
        """The command's result, for scripts."""
        if self.as_json:
            click.echo(json.dumps(data, indent=1))


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
