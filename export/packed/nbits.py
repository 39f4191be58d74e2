"""Products by a matrix as it is packed: MatMulNBits of com.microsoft, which ONNX Runtime has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import onnx
from onnx.helper import make_node

from llmexport.export.packed.nodes import Maker
from llmexport.export.packed.repack import NUMBERS, PLACES, ZEROS

DOMAIN, OP = "com.microsoft", "MatMulNBits"
BLOCKS = (16, 32, 64, 128, 256)  # columns that may share a scale
LEVEL = 4  # at which what is multiplied with is rounded to 8 bits


@dataclass
class Multiplier(Maker):
    """Gives products the matrix itself, where `fits`."""

    @property
    def fits(self) -> bool:
        """Whether MatMulNBits reads the numbers where they lie: unsigned, along rows, in groups of its sizes."""
        matrix, anew = self.matrix, {self.matrix.name + n for n in (NUMBERS, PLACES, ZEROS)}
        odd = matrix.layout != "rows" or matrix.factor or matrix.scales.second or matrix.scales.block[0] != 1
        packed = matrix.number in ("uint4", "uint8") and matrix.scales.block[1] in BLOCKS
        return packed and not odd and anew.isdisjoint(self.tensors)

    def multiply(self, readers: Iterable[onnx.NodeProto]) -> None:
        """Makes MatMulNBits of these products by the transpose, at the level that ONNX Runtime gives what it fuses."""
        matrix, (rows, columns), block = self.matrix, self.matrix.shape, self.matrix.scales.block[1]
        numbers = self._stored(matrix.values, (rows, columns // block, block * matrix.bits // 8), "uint8")
        scales = self._scales(matrix.scales, matrix.grid, self.dtype)
        sizes: dict[str, Any] = {
            "K": columns,
            "N": rows,
            "bits": matrix.bits,
            "block_size": block,
            "accuracy_level": LEVEL,
        }
        for reader in readers:
            names = [reader.input[0], numbers, scales], list(reader.output), reader.name
            reader.CopyFrom(make_node(OP, *names, domain=DOMAIN, **sizes))
