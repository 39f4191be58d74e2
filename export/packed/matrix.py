"""Matrices that a checkpoint holds in few bits, each in several tensors, and the numbers that they mean."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from llmexport.plugins.dtypes import BY_NAME
from llmexport.plugins.microscaling import SCALE_BIAS, VALUES

if TYPE_CHECKING:
    import numpy as np

Read = Callable[[str], "np.ndarray"]
Layout = Literal[
    "rows",  # along each row of the matrix, the first in the lowest bits, as ONNX packs
    "words",  # the transpose, [columns, rows]: words of 32 bits hold neighbours of one of the matrix's rows (GPTQ)
    "interleaved",  # the transpose: words hold eight neighbours of one of the matrix's columns, in ORDER (AWQ)
    "pairs",  # bytes hold two neighbours of one of the matrix's columns, the first in the low half (ModelOpt)
    "stacked",  # of each expert the transpose, [experts, columns, rows]: bytes hold neighbours of a matrix's row
]
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
FP8 = "float8_e4m3fn"
EXPONENTS = ("uint8", "float8_e8m0fnu")  # the types of scales that are powers of two


@dataclass(frozen=True, slots=True)
class Scales:
    """A scale for each `block` of rows and columns, in the tensor `name`: a grid [row blocks, column blocks].

    The tensor may be the grid's transpose (`turned`), in a stack that of each expert's. `second` is one factor more of
    all, or divisor if it `divides`. Bytes are exponents (E8M0).
    """

    name: str
    dtype: str
    block: tuple[int, int]
    turned: bool = False
    second: str | None = None
    divides: bool = False


@dataclass(frozen=True, slots=True)
class Zeros:
    """A number that means zero for each block of the scales, in the tensor `name`, packed as `layout` says.

    `add` is added to what is stored, within the bits that a number has.
    """

    name: str
    layout: Layout
    add: int = 0


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix [rows, columns] of outputs and inputs, in few bits: (number - zero) * scale * factor.

    values: the tensor of the numbers, `number` their type once they are unpacked. offset: what means zero where no
    `zeros` do. order: the tensor that says of which group of columns each column is; in their order without it.
    factor: the tensor of a factor for each column. beside: tensors that belong to it and change no weight. experts: of
    how many it has the matrices, one below the other; the tensor is called as the matrix then.
    """

    name: str
    shape: tuple[int, int]
    values: str
    number: str
    layout: Layout
    scales: Scales
    zeros: Zeros | None = None
    offset: int = 0
    order: str | None = None
    factor: str | None = None
    beside: tuple[str, ...] = ()
    experts: int = 0

    @property
    def unquantised(self) -> tuple[int, ...]:
        """The shape of the tensor that a checkpoint in 16 bits has in its place."""
        if not self.experts:
            return self.shape
        rows, columns = self.shape[0] // self.experts, self.shape[1]
        return (self.experts, columns, rows) if self.layout == "stacked" else (self.experts, rows, columns)

    @property
    def bits(self) -> int:
        return BY_NAME[self.number].bits

    @property
    def grid(self) -> tuple[int, int]:
        """How many blocks of rows and of columns have a scale."""
        sizes = zip(self.shape, self.scales.block, strict=True)
        rows, columns = (math.ceil(n / block) for n, block in sizes)
        return rows, columns

    @property
    def tensors(self) -> tuple[str, ...]:
        """All that it is made of, and what lies beside."""
        zeros = self.zeros.name if self.zeros else None
        made = (self.values, self.scales.name, self.scales.second, zeros, self.order, self.factor)
        return (*(n for n in made if n), *self.beside)

    def floats(self, read: Read) -> np.ndarray:
        """What it means as the tensor that a checkpoint in 16 bits has in its place, in float32."""
        made = self.decode(read)
        if self.layout == "stacked":
            made = made.reshape(self.experts, -1, self.shape[1]).swapaxes(1, 2)
        return made.reshape(self.unquantised)

    def decode(self, read: Read) -> np.ndarray:
        """The numbers [rows, columns] that it means, in float32; `read` gives a tensor as it is stored."""
        import numpy as np

        numbers = self.numbers(read)
        if self.zeros or self.offset:
            numbers = numbers - self._spread(self.zero_points(read), read)
        made = self._scaled(np.require(numbers, np.float32, ["C", "W", "O"]), self.grid_of_scales(read), read)
        return made * read(self.factor).astype(np.float32).reshape(1, -1) if self.factor else made

    def numbers(self, read: Read) -> np.ndarray:
        """The numbers [rows, columns] as they are stored, before any zero or scale."""
        import numpy as np

        stored, layout = read(self.values), self.layout
        if layout == "stacked":
            stored, layout = stored.swapaxes(1, 2).reshape(self.shape[0], -1), "rows"
        if self.number == "float4_e2m1fn":
            table = np.array(VALUES, np.float32)
            return table[unpack(stored, self.shape, 4, layout)]
        if layout == "rows" and stored.dtype.name == self.number:
            numbers = stored.reshape(self.shape)
            if self.number != FP8:
                return numbers.astype(np.float32)
            # A third of the time that a cast takes.
            return np.take(_of_bytes(numbers.dtype), numbers.view(np.uint8))
        unsigned = unpack(stored, self.shape, self.bits, layout).astype(np.int16)
        if self.number.startswith("u"):
            return unsigned
        half = 1 << (self.bits - 1)
        return (unsigned ^ half) - half

    def zero_points(self, read: Read) -> np.ndarray:
        """What means zero in each block [row blocks, column blocks]."""
        import numpy as np

        if self.zeros is None:
            return np.full((1, 1), self.offset, np.int16)
        stored = read(self.zeros.name)
        rows, groups = self.grid
        if self.zeros.layout == "rows":
            # Words along the rows of the grid: the transpose is packed along its own rows.
            unpacked = unpack(np.ascontiguousarray(stored.T), (groups, rows), self.bits, "rows").T
        elif self.zeros.layout == "words":
            unpacked = unpack(stored, (groups, rows), self.bits, "rows").T
        else:
            unpacked = unpack(stored, (rows, groups), self.bits, self.zeros.layout)
        return (unpacked.astype(np.int16) + self.zeros.add) & ((1 << self.bits) - 1)

    def grid_of_scales(self, read: Read) -> np.ndarray:
        """The scale of each block [row blocks, column blocks], in float32."""
        import numpy as np

        said = self.scales
        grid = in_float32(self.turned(read(said.name)) if said.turned else read(said.name)).reshape(self.grid)
        if said.second:
            second = read(said.second).astype(np.float32).reshape(())
            return grid / second if said.divides else grid * second
        return grid

    def turned(self, scales: np.ndarray) -> np.ndarray:
        """Scales that are the grid's transpose, as they lie in the grid."""
        rows, columns = self.grid
        return scales.reshape(-1, columns, rows // (self.experts or 1)).swapaxes(1, 2)

    def _scaled(self, made: np.ndarray, grid: np.ndarray, read: Read) -> np.ndarray:
        """Numbers times what a grid says of each, in their place: by blocks, where these fill rows and columns."""
        (rows, columns), (tall, wide) = self.shape, grid.shape
        sides = zip(grid.shape, self.scales.block, self.shape, strict=True)
        if self.order or not all(n == 1 or n * size == whole for n, size, whole in sides):
            made *= self._spread(grid, read)
        else:
            blocks = made.reshape(tall, rows // tall, wide, columns // wide)
            blocks *= grid[:, None, :, None]
        return made

    def _spread(self, grid: np.ndarray, read: Read) -> np.ndarray:
        """What a grid says of each number [rows, columns], or [1, 1] of all."""
        import numpy as np

        if grid.size == 1:
            return grid
        rows, columns = self.shape
        tall = np.repeat(grid, self.scales.block[0], 0)[:rows]
        if self.order:
            return tall[:, read(self.order)]
        return np.repeat(tall, self.scales.block[1], 1)[:, :columns]


@functools.cache
def _of_bytes(dtype: np.dtype[Any]) -> np.ndarray:
    """What each byte means in this type, in float32."""
    import numpy as np

    return np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)


def in_float32(scales: np.ndarray) -> np.ndarray:
    """Scales as they are stored, as numbers."""
    import numpy as np

    if scales.dtype.name not in EXPONENTS:
        return scales.astype(np.float32)
    return np.ldexp(np.float32(1), scales.view(np.uint8).astype(np.int32) - SCALE_BIAS).astype(np.float32)


def unpack(stored: np.ndarray, shape: tuple[int, int], bits: int, layout: Layout) -> np.ndarray:
    """The unsigned numbers [rows, columns], a byte each, of a tensor that packs them so."""
    import numpy as np

    rows, columns = shape
    if layout == "rows":
        flat = _numbers(np.ascontiguousarray(stored), bits)
        # What fills the last word of a row means nothing.
        return flat.reshape(rows, -1)[:, :columns]
    if layout == "pairs":
        return _numbers(np.ascontiguousarray(stored)[..., None], bits).transpose(0, 2, 1).reshape(rows, columns)
    words = _numbers(np.ascontiguousarray(stored)[..., None], bits)
    if layout == "words":
        return words.transpose(1, 0, 2).reshape(rows, columns)
    return words[..., np.argsort(ORDER)].reshape(columns, rows).T


def _numbers(stored: np.ndarray, bits: int) -> np.ndarray:
    """The last axis of words or bytes as the numbers in it, the one in the lowest bits first."""
    import numpy as np

    held = stored.view(np.uint8)
    if bits == 8:
        return held
    return np.stack((held & 15, held >> 4), -1).reshape(*held.shape[:-1], -1)


def pack(numbers: np.ndarray) -> np.ndarray:
    """Numbers of 4 bits, a byte each, two a byte along the last axis, the first in the low half."""
    return numbers[..., ::2] | numbers[..., 1::2] << 4
