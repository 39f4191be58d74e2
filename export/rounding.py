"""Rounding to nearest, symmetric: the numbers that stand for rows of a matrix, and their scales, as compressed-tensors
has them (compressed_tensors/quantization/utils/helpers.py, calculate_qparams)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from llmexport.export.packed.matrix import pack

GROUPS = (128, 64, 32)  # columns that share a scale of int4, the default first


@dataclass(frozen=True, slots=True)
class Rounding:
    """To numbers of so many `bits`, from `low` to `high`. Those of NAME.weight lie in the tensor NAME + `ending`.

    stored: the type of that tensor, of BY_NAME. format: what compressed-tensors calls how they lie.
    """

    bits: int
    low: int
    high: int
    stored: str
    ending: str
    format: str

    @property
    def packs(self) -> bool:
        """Whether an item of the tensor holds several numbers; their scales are those of groups, others of rows."""
        return self.bits < 8

    @property
    def in_item(self) -> int:
        """How many numbers an item of the stored type holds."""
        return 32 // self.bits if self.packs else 1

    def round(self, rows: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of rows [N, C], in bytes as they are stored, and scales [N, C / size] in the type of the rows.

        Of columns that are all zero the scale is 1. Raises FloatingPointError on a number that is not finite.
        """
        # The quotient of two floats of 16 bits is near a tie only if it is one, and float32 tells it apart.
        wide = np.float32 if rows.dtype.itemsize == 2 else np.float64
        apart = rows.astype(wide).reshape(len(rows), -1, size)
        scales = (np.abs(apart).max(-1) / ((self.high - self.low) / 2)).astype(rows.dtype)
        if not np.isfinite(scales.astype(wide)).all():
            raise FloatingPointError("not finite")
        scales[scales == 0] = 1
        np.divide(apart, scales[..., None].astype(wide), out=apart)
        if self.stored == "float8_e4m3fn":
            numbers = apart.clip(self.low, self.high).astype(ml_dtypes.float8_e4m3fn)
        else:
            np.rint(apart, out=apart).clip(self.low, self.high, out=apart)
            numbers = (apart - self.low).astype(np.uint8) if self.packs else apart.astype(np.int8)
        numbers = numbers.reshape(len(rows), -1)
        return (pack(numbers) if self.packs else numbers), scales

    def said(self, size: int | None) -> dict[str, Any]:
        """What compressed-tensors says of weights that are rounded so; `size` is that of a group."""
        kind = "float" if self.stored.startswith("float") else "int"
        shared = {"strategy": "group", "group_size": size} if self.packs else {"strategy": "channel"}
        return {"num_bits": self.bits, "type": kind, **shared, "symmetric": True, "dynamic": False}


ROUNDINGS: Mapping[str, Rounding] = MappingProxyType(
    {
        "int4": Rounding(4, -8, 7, "int32", ".weight_packed", "pack-quantized"),
        "int8": Rounding(8, -128, 127, "int8", ".weight", "int-quantized"),
        "fp8": Rounding(8, -448, 448, "float8_e4m3fn", ".weight", "float-quantized"),
    }
)
