"""A tensor where it lies in a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import numpy as np

    from llmexport.export.coded import Coded


@dataclass(frozen=True, slots=True)
class StoredTensor:
    name: str
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]
    file: str  # the shard's name in the folder
    offset: int  # from the beginning of the file
    nbytes: int
    turned: int = 0  # of a matrix whose transpose lies there: numbers from one of its columns to the next
    # Of a matrix that lies nowhere: what it is made of. `offset` means nothing then, and `nbytes` what it would take.
    coded: Coded | None = None

    def mapped(self, file: Path | BinaryIO, dtype: np.dtype[Any]) -> np.ndarray:
        """What lies in a file, read-only and without a copy."""
        import numpy as np

        assert not self.coded, self.name
        if not self.turned:
            return np.memmap(file, dtype, "r", self.offset, self.shape)
        rows, columns = self.shape
        numbers = np.memmap(file, dtype, "r", self.offset, ((columns - 1) * self.turned + rows,))
        steps = (dtype.itemsize, self.turned * dtype.itemsize)
        return np.lib.stride_tricks.as_strided(numbers, self.shape, steps, writeable=False)
