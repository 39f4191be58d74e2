"""What numbers of OCP Microscaling Formats 1.0 mean: E2M1, and E8M0, the powers of two that blocks of numbers share."""

# The 16 values of E2M1, by code.
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
BLOCK = 32  # values that share a scale
SCALE_BIAS = 127
