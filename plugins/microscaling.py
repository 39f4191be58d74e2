"""What numbers of OCP Microscaling Formats 1.0 mean: E2M1, E4M3, and E8M0, the powers of two that blocks share."""

import math


def _e4m3(byte: int) -> float:
    exponent, mantissa = byte >> 3 & 15, byte & 7
    if byte & 127 == 127:
        return math.nan
    size = math.ldexp(mantissa + 8 * (exponent > 0), max(exponent, 1) - 10)
    return -size if byte & 128 else size


# The 16 values of E2M1 and the 256 of E4M3 (float8_e4m3fn), by code.
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
E4M3 = tuple(map(_e4m3, range(256)))
BLOCK = 32  # values that share a scale
SCALE_BIAS = 127
# The 256 values of E8M0, by code; the last, which is NaN there, goes on as others do.
POWERS = tuple(2.0 ** (byte - SCALE_BIAS) for byte in range(256))
