"""Blocks of vision towers: one of each kind and of each value of a field, and those whose traces are tried."""

from __future__ import annotations

import dataclasses
from typing import Any

from llmexport.export.spec import (
    FEATURES,
    TILES,
    Attention,
    Layer,
    Mlp,
    Norm,
    PatchEmbedding,
    PatchMerger,
    PatchPlaces,
    PatchPositions,
    PatchRotary,
    PixelShuffle,
    PooledProjector,
    Projector,
    SegmentMask,
    Splice,
    Sublayer,
    TileEmbedding,
    TileRotary,
    patch_axis,
)


def each(block: Any, /, **changes: Any) -> list[Any]:
    """The block, and one that differs in each of these fields."""
    return [block, *(dataclasses.replace(block, **{field: value}) for field, value in changes.items())]


AXIS, OTHER = patch_axis(4), patch_axis(9)
PACKED = Attention(64, 4, 4, 16, cached=False, axes=(1, AXIS))
NORM = Norm(64, 1e-6, statistics="layer", bias=True, axes=(1, AXIS))
VISION_BLOCKS = [
    PACKED,
    *each(Attention(64, 4, 4, 16, cached=False, masked=False, axes=(TILES, 17)), axes=(TILES, 26)),
    *each(Mlp(64, 128, "gelu_tanh", gated=False, axes=(1, AXIS)), axes=(TILES, 17)),
    *each(NORM, axes=(TILES, 17)),
    *each(PatchEmbedding(3, 2, 4, 64, AXIS), channels=1, frames=1, patch=2, hidden=32, axis=OTHER),
    *each(PatchPlaces(2, 96, AXIS), merge=3, numbers=48, axis=OTHER),
    *each(PatchPositions(6, 64, AXIS), side=7, hidden=32, axis=OTHER),
    *each(PatchRotary(16, 10000.0, AXIS), size=8, theta=100.0, axis=OTHER),
    *each(SegmentMask(AXIS), axis=OTHER),
    *each(PatchMerger(NORM, 2, 48, AXIS), norm=Norm(32, 1e-6), merge=3, out=96, axis=OTHER),
    *each(TileEmbedding(3, 4, 4, 64), channels=1, side=6, patch=2, hidden=32, kernel=True),
    *each(TileRotary(3, 4, 4, 16, 10000.0), channels=1, side=6, patch=2, size=8, theta=100.0),
    *each(PixelShuffle(6, 2, 64, 48), side=12, merge=3, hidden=32, out=96),
    *each(Projector(9, 48, 64), tokens=4, hidden=32, out=96),
    *each(PooledProjector(6, 2, NORM, 96), side=12, merge=3, norm=Norm(64, 1e-6, 1.0, "after_weight"), out=64),
    *each(Splice((250, 251), 64), tokens=(250,), hidden=32, numbered=True),
]

ROWS = (1, AXIS)
LAYER_NORM = Norm(33, 1e-6, statistics="layer", bias=True, axes=ROWS)
MASKED = Attention(33, 3, 3, 12, qkv_bias=True, out_bias=True, fused=True, cached=False, axes=ROWS)
OF_TILES = (TILES, 10)
TILED = Attention(33, 3, 3, 12, qkv_bias=True, interleaved=True, cached=False, masked=False, axes=OF_TILES)
MLP = Mlp(33, 65, "gelu_tanh", bias=True, gated=False, axes=ROWS)
TILE_NORM = Norm(33, 1e-5, statistics="layer", bias=True, axes=OF_TILES)
POOLED = Norm(33, 1e-6, 1.0, "after_weight", axes=(TILES, 9))
VISION_TRACES = [
    (PatchEmbedding(3, 2, 4, 33, AXIS), "float32"),
    (PatchEmbedding(3, 2, 4, 33, AXIS), "float16"),
    (PatchPlaces(2, 96, AXIS), "float32"),
    (PatchPlaces(3, 96, OTHER), "float32"),
    (PatchPositions(7, 33, AXIS), "float32"),
    (PatchPositions(7, 33, AXIS), "float16"),
    (PatchRotary(12, 10000.0, AXIS), "float32"),
    (SegmentMask(AXIS), "float32"),
    (PatchMerger(LAYER_NORM, 2, 21, AXIS), "float32"),
    (PatchMerger(LAYER_NORM, 2, 21, AXIS), "float16"),
    (PatchMerger(dataclasses.replace(LAYER_NORM, axes=(1, FEATURES)), 1, 21, FEATURES), "float32"),
    (MASKED, "float32"),
    (MASKED, "float16"),
    (Layer((Sublayer("self_attn", MASKED, LAYER_NORM), Sublayer("mlp", MLP, LAYER_NORM))), "float32"),
    (TileEmbedding(3, 3, 4, 33), "float32"),
    (TileEmbedding(3, 3, 4, 33), "float16"),
    (TileEmbedding(3, 3, 4, 33, kernel=True), "float32"),
    (TileEmbedding(3, 3, 4, 33, kernel=True), "float16"),
    (TileRotary(3, 3, 4, 12, 10000.0), "float32"),
    (TILED, "float32"),
    (TILED, "float16"),
    (TILE_NORM, "float16"),
    (PixelShuffle(6, 2, 33, 21), "float32"),
    (PixelShuffle(6, 2, 33, 21), "float16"),
    (Projector(9, 33, 21), "float32"),
    (Splice((7, 9), 33), "float32"),
    (PooledProjector(6, 2, POOLED, 21), "float32"),
    (PooledProjector(6, 3, dataclasses.replace(POOLED, axes=(TILES, 4)), 21), "float16"),
    (Splice((7,), 33), "float16"),
    (Splice((7, 9), 33, numbered=True), "float32"),
]
