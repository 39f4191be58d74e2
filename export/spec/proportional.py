"""RoPE that turns a part of each head, in steps of the whole of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ProportionalScaling:
    """The first `turning` frequencies of a head turn, in the steps that all of them would, and the others stand still
    ("proportional", transformers modeling_rope_utils.py)."""

    turning: int
