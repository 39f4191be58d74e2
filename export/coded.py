"""Matrices in few bits as if a checkpoint held what they mean: for what rounds them anew, some rows at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from llmexport.export.checkpoint import Checkpoint
from llmexport.export.packed.matrix import FP8, Matrix
from llmexport.export.packed.read import cache_scales
from llmexport.export.packed.scheme import without
from llmexport.export.stored_tensor import StoredTensor
from llmexport.plugins.dtypes import BY_NAME, BY_SAFETENSORS

if TYPE_CHECKING:
    import numpy as np


# As published tools make 16 bits of them (DeepSeek's fp8_cast_bf16.py). It holds each number of MXFP4.
MEANT = "bfloat16"


@dataclass(frozen=True, slots=True)
class Coded:
    """A matrix of numbers and their scales alone, which lie in two tensors."""

    matrix: Matrix
    numbers: StoredTensor
    scales: StoredTensor

    @property
    def meant(self) -> StoredTensor:
        """The tensor that a checkpoint in 16 bits has in its place, which lies nowhere."""
        (rows, columns), kind = self.matrix.shape, BY_NAME[MEANT]
        nbytes = rows * columns * kind.bits // 8
        return StoredTensor(
            self.matrix.name, kind.safetensors, (rows, columns), self.numbers.file, 0, nbytes, coded=self
        )

    @property
    def files(self) -> set[str]:
        return {self.numbers.file, self.scales.file}

    def rows(self, opened: Mapping[str, BinaryIO], most: int) -> Iterator[np.ndarray]:
        """The rows that it means in bfloat16, so many numbers at a time or a row of blocks; `opened`: its files."""
        import numpy as np

        matrix, (rows, columns), tall = self.matrix, self.matrix.shape, self.matrix.scales.block[0]
        numbers, scales = (
            t.mapped(opened[t.file], np.dtype(BY_SAFETENSORS[t.dtype].name)) for t in (self.numbers, self.scales)
        )
        grid, height = scales.reshape(matrix.grid), max(1, most // columns)
        if 1 < tall < rows:
            height = max(1, height // tall) * tall
        for at in range(0, rows, height):
            end = min(at + height, rows)
            held = {matrix.values: numbers[at:end], matrix.scales.name: grid[at // tall : math.ceil(end / tall)]}
            some = dataclasses.replace(matrix, shape=(end - at, columns))
            # What is no number is said where it is rounded.
            with np.errstate(over="ignore", invalid="ignore"):
                made = some.decode(held.__getitem__)
            yield made.astype(MEANT)


def can_be_floats(checkpoint: Checkpoint) -> bool:
    """Whether all of its matrices are of FP8, each one by itself, with a scale for each row, block or matrix."""
    return all(m.number == FP8 and not (m.experts or m.factor) for m in checkpoint.matrices.values())


def in_floats(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as if it held what its matrices mean, in bfloat16. Scales of a cache are left out."""
    found, gone = {}, set(cache_scales(checkpoint.tensors))
    for matrix in checkpoint.matrices.values():
        held = (checkpoint.tensors[n] for n in (matrix.values, matrix.scales.name))
        found[matrix.values] = Coded(matrix, *held).meant
        gone |= {*matrix.tensors}
    kept = (found.get(n, t) for n, t in checkpoint.tensors.items() if n in found or n not in gone)
    config = without(checkpoint.config)
    return dataclasses.replace(checkpoint, tensors={t.name: t for t in kept}, config=config, matrices={})
