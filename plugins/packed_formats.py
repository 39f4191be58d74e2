"""The formats of MoeExperts' weights: what codes, scales and zero points mean.

Needs no torch: a spec asks it for sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmexport.plugins.microscaling import BLOCK, E4M3, POWERS, VALUES

PLAIN = "plain"


@dataclass(frozen=True)
class Format:
    """Weights of `values` by code: two codes a byte along columns, the low nibble first, if there are 16, else one.

    group: the columns that share a scale, 0 if a node says so. scales: the value of each byte of scales; empty if they
    are fp32. zero: the code of 0 where a node has no zero points; None in a format without any.
    """

    values: tuple[float, ...]
    group: int = 0
    scales: tuple[float, ...] = ()
    zero: int | None = None

    @property
    def per_byte(self) -> int:
        return 2 if len(self.values) == 16 else 1

    def values_with(self, zeros: bool) -> tuple[float, ...]:
        """Less the zero point, unless the node has its own."""
        return self.values if self.zero is None or zeros else tuple(v - self.zero for v in self.values)

    def by_byte(self, zeros: bool = False) -> dict[str, tuple[float, ...]]:
        """What each byte holds, as tables by their names: its value, or those of its low and of its high nibble."""
        values = self.values_with(zeros)
        if self.per_byte == 1:
            return {"values": values}
        low, high = zip(*((values[byte % 16], values[byte // 16]) for byte in range(256)), strict=True)
        return {"low_values": low, "high_values": high}


PACKED = {
    "mxfp4": Format(VALUES, BLOCK, POWERS),
    "mxfp8": Format(E4M3, BLOCK, POWERS),
    "nvfp4": Format(VALUES, 16, E4M3),
    "fp8": Format(E4M3),
    "uint4": Format(tuple(map(float, range(16))), zero=8),
    "uint8": Format(tuple(map(float, range(256))), zero=128),
    "int8": Format(tuple(float((byte + 128) % 256 - 128) for byte in range(256))),
}
FORMATS = (PLAIN, *PACKED)
