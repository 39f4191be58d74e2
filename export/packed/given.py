"""Constants of which TensorRT is given other bytes than a model's file says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Run:
    """Bytes in a file."""

    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Given:
    """A constant of which TensorRT is given the bytes of these runs, each changed by `mask` (XOR)."""

    name: str
    runs: tuple[Run, ...]
    mask: int = 0

    def read(self, folder: Path) -> np.ndarray:
        """The bytes, where files lie in `folder`."""
        import numpy as np

        whole = np.empty(sum(r.nbytes for r in self.runs), np.uint8)
        at = 0
        for run in self.runs:
            whole[at : at + run.nbytes] = np.fromfile(folder / run.file, np.uint8, run.nbytes, offset=run.offset)
            at += run.nbytes
        whole ^= np.uint8(self.mask)
        return whole
