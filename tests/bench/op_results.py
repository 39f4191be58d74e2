"""The file that bench_ops.py writes: whole after every row, so that a run that is cut off keeps its rows."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

# What tells rows apart: wgmma is of other kernels.
KEY = ("op", "family", "B", "T", "wgmma")
# Rows of a file stay beside new ones if these are the same.
SAME = ("gpu", "commit", "kernels")

Row = dict[str, Any]


class Results:
    """Rows of this run and, of the same kernels on the same GPU, those that `path` holds of earlier ones.

    `run` says what all rows of this one share: each carries its date and when wgmma is taken.
    """

    def __init__(self, path: Path, run: dict[str, Any]) -> None:
        self.path, self.run = path, run
        earlier = json.loads(path.read_text()) if path.exists() else {}
        self.rows: list[Row] = earlier["rows"] if all(earlier.get(k) == run[k] for k in SAME) else []
        self._write()

    def add(self, row: Row) -> None:
        row = {**row, "wgmma": self.run["wgmma"], "date": self.run["date"]}
        self.rows = [r for r in self.rows if any(r[k] != row[k] for k in KEY)] + [row]
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        beside.write_text(json.dumps({**self.run, "rows": self.rows}, indent=1) + "\n")
        os.replace(beside, self.path)
