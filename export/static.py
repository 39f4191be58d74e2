"""The static cache: slots that are made once and written in place, where the dynamic one is copied as it grows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Container, Iterable
from dataclasses import dataclass

from llmexport.export.errors import ExportError
from llmexport.export.spec import (
    MOST,
    WRITTEN,
    Alibi,
    Attention,
    Block,
    Keys,
    LatentAttention,
    Layer,
    Mask,
    Passage,
    Presence,
    Slots,
    Span,
    Temperature,
)

Reads = tuple[Block, ...]
WRITER = "QkNormRopeWrite"
FUSED = "static-fused"  # the static cache that an op of ours writes, with what makes its keys and values
# Behind two of them a token takes ONNX Runtime's CPU as long with all slots as with a window's, which are copied.
FEW_WINDOWS = 4
FEWEST = 16  # slots; fewer leave no room for a prompt and the steps that an export is compared over


@dataclass(frozen=True)
class StaticCache:
    """`slots` of a row; layers with a window keep all of them too where they are no more than so many `windows`."""

    slots: int
    windows: float = 1


def with_slots(layer: Layer, reads: Reads, static: StaticCache) -> tuple[Layer, Reads]:
    """The layer whose cache is static, and what it then reads.

    A layer that sees the last tokens alone, or its own chunk, keeps only as many, unless all are kept: they move up
    with every step, as TensorRT writes no cache in a circle.
    """
    slots = static.slots
    windows = [w for b in reads if isinstance(b, Mask) for w in (b.window, b.chunk) if w]
    windows += [s.block.window for s in layer.sublayers if isinstance(s.block, Attention) and s.block.window]
    window = min(windows, default=slots)
    kept = slots if slots <= static.windows * window else window
    keys = Keys(kept, slides=True) if kept < slots else Keys(slots)
    sublayers = tuple(dataclasses.replace(s, block=_static(s.block, keys)) for s in layer.sublayers)
    return dataclasses.replace(layer, sublayers=sublayers), (Slots(slots), *(_static(b, keys) for b in reads))


def windows_of(window_slots: str, target: str) -> float:
    """How many windows the slots may be of which a layer with a window keeps all; `window_slots`: auto, last or all."""
    few = FEW_WINDOWS if target == "onnxruntime" else 1
    return {"auto": few, "last": 1, "all": math.inf}[window_slots]


def slots_of(blocks: Iterable[Block]) -> int | None:
    """How many slots the static cache of these blocks has; None where there is none."""
    return min((b.most[WRITTEN] for b in blocks if WRITTEN in b.most), default=None)


def _static(block: Block, keys: Keys) -> Block:
    match block:
        case Attention() | LatentAttention() | Mask() | Span() | Alibi():
            return dataclasses.replace(block, keys=keys)
        case Temperature(placed=False) | Presence() | Passage():
            return dataclasses.replace(block, static=True)
    return block


def check_slots(cache: str, slots: int | None, target: str, window_slots: str) -> None:
    """Raise ExportError unless the number of slots that is asked for, and the target, fit the kind of cache."""
    if cache == FUSED and target == "onnxruntime":
        raise ExportError(f"--cache {FUSED} is for TensorRT with our plugins: for ONNX Runtime take --cache static")
    if cache != "dynamic" and slots is None:
        raise ExportError("a static cache has as many slots as is said: add --max-tokens, as 4096")
    if cache == "dynamic" and slots is not None:
        raise ExportError(f"--max-tokens {slots} is of a static cache, and a dynamic one grows: add --cache static")
    if cache == "dynamic" and window_slots == "all":
        raise ExportError(f"--window-slots {window_slots} is of a static cache: add --cache static")
    if slots is not None and not FEWEST <= slots <= MOST:
        raise ExportError(f"--max-tokens is {slots}: make it {FEWEST} to {MOST}")


def kind_of(ops: Container[str]) -> str:
    """The kind of a static cache, by the ops of its graph."""
    return FUSED if WRITER in ops else "static"


def check_fused(cache: str, ops: Container[str]) -> None:
    """Raise ExportError if a cache was to be written by ops of ours and none of these is one."""
    if cache == FUSED and kind_of(ops) != FUSED:
        said = "no layer here turns q and k by RoPE and writes them into slots"
        raise ExportError(f"--cache {FUSED}: {said}: take --cache static")
