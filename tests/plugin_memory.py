"""Memory of the machine that runs the kernels, with guard bands around what they write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

GUARD_BYTES, GUARD = 256, 0xA5


class Memory(Protocol):
    """Where the kernels run. `place` puts bytes at an address and keeps them; `read` gets them back."""

    stream: int | None

    def place(self, content: np.ndarray) -> int: ...
    def read(self, address: int) -> np.ndarray: ...


class CpuMemory:
    """Each block of bytes is an allocation of its exact size, whose ends a sanitizer watches."""

    stream = None

    def __init__(self) -> None:
        self.blocks: dict[int, np.ndarray] = {}

    def place(self, content: np.ndarray) -> int:
        block = content.copy()
        self.blocks[block.ctypes.data] = block
        return block.ctypes.data

    def read(self, address: int) -> np.ndarray:
        return self.blocks[address]


class GpuMemory:
    """CUDA memory, by torch."""

    def __init__(self) -> None:
        import torch

        self.torch = torch
        self.stream = torch.cuda.current_stream().cuda_stream
        self.blocks: dict[int, Any] = {}

    def place(self, content: np.ndarray) -> int:
        block = self.torch.from_numpy(content.copy()).cuda()
        self.blocks[block.data_ptr()] = block
        return block.data_ptr()

    def read(self, address: int) -> np.ndarray:
        return self.blocks[address].cpu().numpy()


@dataclass(frozen=True)
class Output:
    """Memory for a result, between two guard bands, `shift` elements past an aligned address."""

    memory: Memory
    block: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    shift: int

    @classmethod
    def make(cls, memory: Memory, shape: tuple[int, ...], dtype: np.dtype[Any], shift: int) -> Output:
        """Full of NaN."""
        nans = np.full(int(np.prod(shape)) * dtype.itemsize, 0xFF, np.uint8)  # a NaN in every float type
        return cls.holding(memory, nans.view(dtype).reshape(shape), shift)

    @classmethod
    def holding(cls, memory: Memory, values: np.ndarray, shift: int = 0) -> Output:
        """Of something that is read before it is written."""
        content = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        guard = np.full(GUARD_BYTES, GUARD, np.uint8)
        before = np.full(GUARD_BYTES + shift * values.itemsize, GUARD, np.uint8)
        block = memory.place(np.concatenate([before, content, guard]))
        return cls(memory, block, values.shape, values.dtype, shift)

    @property
    def address(self) -> int:
        return self.block + GUARD_BYTES + self.shift * self.dtype.itemsize

    def read(self) -> np.ndarray:
        content = self.memory.read(self.block)
        start = GUARD_BYTES + self.shift * self.dtype.itemsize
        end = start + int(np.prod(self.shape)) * self.dtype.itemsize
        assert (content[:start] == GUARD).all(), "wrote before its output"
        assert (content[end:] == GUARD).all(), "wrote past its output"
        return content[start:end].view(self.dtype).reshape(self.shape)
