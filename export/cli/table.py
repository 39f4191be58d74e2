"""Tables in plain text: no library for them, whose import takes longer than most commands."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence

GAP = "   "
BOLD = "\x1b[1m{}\x1b[0m"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], width: int, bold: bool = False) -> str:
    """A titled table of `width` cells at most, but for the title; no columns, no header.

    What is too long for its column goes on in the next line. bold: title and header are so, on a terminal.
    """
    styled = BOLD.format if bold else str
    lines, every = [styled(title)], [columns, *rows] if columns else rows
    if every:
        longest = [max(map(cells, column)) for column in zip(*every, strict=True)]
        widths = narrowed(longest, width - len(GAP) * (len(longest) - 1))
        wrapped = [[wrap(cell, n) for cell, n in zip(row, widths, strict=True)] for row in every]
        # Words seldom fill the width that a column has.
        widths = [max(cells(line) for cell in column for line in cell) for column in zip(*wrapped, strict=True)]
        for i, row in enumerate(wrapped):
            drawn = list(_drawn(row, widths))
            lines += map(styled, drawn) if columns and not i else drawn
            if columns and not i:
                lines.append("─" * (sum(widths) + len(GAP) * (len(widths) - 1)))
    return "".join(f"{line}\n" for line in lines)


def cells(text: str) -> int:
    """How many cells of a terminal a text takes: wide characters two, those that join another none."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def narrowed(widths: Sequence[int], most: int) -> list[int]:
    """The widths of columns, the widest cut to equal ones so that their sum is `most`, if each is to have one cell."""
    left, cut = most, list(widths)
    for done, i in enumerate(sorted(range(len(cut)), key=cut.__getitem__)):
        cut[i] = max(1, min(cut[i], left // (len(cut) - done)))
        left -= cut[i]
    return cut


def wrap(text: str, width: int) -> list[str]:
    """The lines of a text, cut at spaces, and within a word that is longer than a line."""
    lines = [""]
    for word in text.split(" "):
        joined = f"{lines[-1]} {word}" if lines[-1] else word
        if cells(joined) <= width:
            lines[-1] = joined
            continue
        if lines == [""]:
            lines = []
        lines += _pieces(word, width)
    return lines


def _pieces(word: str, width: int) -> list[str]:
    pieces = [""]
    for character in word:
        if pieces[-1] and cells(pieces[-1] + character) > width:
            pieces.append("")
        pieces[-1] += character
    return pieces


def _drawn(row: Sequence[Sequence[str]], widths: Sequence[int]) -> Iterator[str]:
    """The lines of a row, whose cells are lines each."""
    for i in range(max(map(len, row))):
        shown = [cell[i] if i < len(cell) else "" for cell in row]
        yield GAP.join(text + " " * (n - cells(text)) for text, n in zip(shown, widths, strict=True)).rstrip()
