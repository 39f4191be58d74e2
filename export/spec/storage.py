"""How a matrix is stored in a checkpoint, as a value: a class for each way."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from llmexport.export.errors import ExportError
from llmexport.plugins.microscaling import BLOCK, SCALE_BIAS
from llmexport.plugins.packed_formats import PACKED, PLAIN

ANY_FLOAT = ("T", "W", "F")
# What of matrices in few bits a tensor of the op is: of all of them, one behind the other.
Role = Literal["", "values", "scales", "factors", "zeros"]


@dataclass(frozen=True)
class Stored:
    """One of the tensors that hold a matrix. Its name is the matrix's with `suffix`, its `shape` the graph's.

    `dtype` is "T" for floats of any type, cast to the model's, and "F" for those that are cast to float32; "W" for
    floats that the graph takes in the type they are stored in; else the one type that it has. A checkpoint may set
    `group`s of the last dimension apart, as one dimension more. A random checkpoint draws evenly from `usual` on and
    below its end; if it is None, as any weight. With a `role` it is made of what holds the matrices in few bits, by
    nodes, or, if `join` is no 0, by the export: it is then written as one tensor, rows of so many matrices in turn. One
    of floats is written anew if it is to `join` several, or is `turned`: the transpose of what the checkpoint has.
    """

    suffix: str
    shape: tuple[int, ...]
    dtype: str = "T"
    group: int | None = None
    usual: tuple[float, float] | None = None
    role: Role = ""
    join: int = 0
    turned: bool = False

    @property
    def anew(self) -> bool:
        """Whether the export writes these floats once more."""
        return not self.role and (self.join > 1 or self.turned)


@dataclass(frozen=True)
class Storage:
    """Base of the ways to store a matrix."""

    @property
    def read_as(self) -> tuple[str, int]:
        """The `format` and `group` of MoeExperts."""
        return PLAIN, 0

    def tensors(self, rows: int, columns: int, matrices: int = 1) -> tuple[Stored, ...]:
        """What holds a matrix, which is several `matrices` one below the other; its values first.

        Raises ExportError if one of these sizes cannot be stored so.
        """
        raise NotImplementedError(type(self).__name__)


@dataclass(frozen=True)
class Plain(Storage):
    """One tensor of floats."""

    def tensors(self, rows: int, columns: int, matrices: int = 1) -> tuple[Stored, ...]:
        return (Stored("", (rows, columns)),)


@dataclass(frozen=True)
class Rewritten(Storage):
    """One tensor of floats, which the export writes if the checkpoint has no such: rows of so many matrices as it is to
    `join` in turn, and the transpose of each that the checkpoint has if it is `turned`."""

    join: int = 1
    turned: bool = False

    def tensors(self, rows: int, columns: int, matrices: int = 1) -> tuple[Stored, ...]:
        return (Stored("", (rows, columns), join=min(self.join, matrices), turned=self.turned),)


@dataclass(frozen=True)
class Mxfp4(Storage):
    """4-bit floats, two a byte, in blocks of 32 that share a power of two (OCP Microscaling Formats 1.0)."""

    @property
    def read_as(self) -> tuple[str, int]:
        return "mxfp4", BLOCK

    def tensors(self, rows: int, columns: int, matrices: int = 1) -> tuple[Stored, ...]:
        if columns % BLOCK:
            raise ExportError(f"MXFP4 packs {BLOCK} values a block, which rows of {columns} do not fill")
        # 4-bit values have a deviation of 3, which these scales make 1 / sqrt(columns): outputs stay of order one.
        middle = SCALE_BIAS - round(math.log2(4 * columns**0.5))
        return (
            Stored("_blocks", (rows, columns // 2), "uint8", group=BLOCK // 2, usual=(0, 256)),
            Stored("_scales", (rows, columns // BLOCK), "uint8", usual=(middle - 1, middle + 2)),
        )


@dataclass(frozen=True)
class Packed(Storage):
    """Numbers of few bits in `group`s of a row's columns that share a scale, as a format of MoeExperts has them.

    Each of the matrices has a factor more if there are `factors`. Unless `join` is 0, the export writes those of all
    experts into one tensor, in which the rows of so many matrices alternate.
    """

    format: str
    group: int
    factors: bool = False
    zeros: bool = False
    join: int = 0

    @property
    def read_as(self) -> tuple[str, int]:
        return self.format, self.group

    def tensors(self, rows: int, columns: int, matrices: int = 1) -> tuple[Stored, ...]:
        form, groups = PACKED[self.format], -(-columns // self.group)
        nbytes, scale = columns // form.per_byte, "uint8" if form.scales else "F"
        held = [
            Stored("", (rows, nbytes), "uint8", role="values"),
            Stored("_scales", (rows, groups), scale, role="scales"),
        ]
        held += [Stored("_factors", (matrices,), "F", role="factors")] if self.factors else []
        held += [Stored("_zeros", (rows, groups), "uint8", role="zeros")] if self.zeros else []
        return tuple(replace(s, join=min(self.join, matrices)) for s in held)
