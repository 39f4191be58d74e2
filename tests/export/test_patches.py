"""Each block of a tower over packed patches, exported alone, against the module of transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from towers import PACKED, RUNNERS, check, pixels, reference, run_only
from transformers.vision_utils import (
    get_vision_attention_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from llmexport.export import blocks, spec
from llmexport.export.archs import choose
from llmexport.export.assembly import named_blocks
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.onnx_file import read_model

pytestmark = pytest.mark.model

CASE, MERGE = PACKED[0], 2
# An image, one as small as they are, a video of two frames, one that is thin.
GRIDS = np.array([[1, 8, 6], [1, 2, 2], [2, 4, 12], [1, 2, 14]])
BLOCKS = (
    *("patch_places", "patch_embedding", "patch_positions", "patch_rotary", "segment_mask"),
    *("layer", "norm", "attention", "mlp", "patch_merger"),
)


def interpolated(grids: torch.Tensor, side: int, table: torch.Tensor) -> torch.Tensor:
    at, weights = get_vision_interpolation_indices_and_weights(
        grids, side, mode="bilinear", align_corners=True, spatial_merge_size=MERGE
    )
    return (table[at] * weights[:, :, None]).sum(1)


@pytest.fixture(scope="module")
def known(tiny_checkpoint) -> dict[str, tuple[dict[str, Any], tuple[Any, ...]]]:
    """What each block reads, and what transformers makes of it."""
    folder = tiny_checkpoint(CASE, "all")
    visual, grids = reference(folder).model.visual, torch.from_numpy(GRIDS)
    feed = pixels(folder, GRIDS)
    colours = torch.from_numpy(feed["pixel_values"])
    hidden = torch.randn(len(colours), 32, generator=torch.Generator().manual_seed(0))
    places = get_vision_position_ids(grids, MERGE)
    extents = grids[:, 1:].repeat_interleave(grids.prod(1), 0)
    ends, _ = get_vision_attention_seqlens(grids, visual.config)
    segments = torch.arange(len(ends) - 1).repeat_interleave(ends.diff())
    mask = torch.block_diag(*(torch.ones(n, n) for n in ends.diff().tolist())).bool()
    side = visual.num_grid_per_side
    first = visual.blocks[0]
    with torch.no_grad():
        turn = visual.rotary_pos_emb(hidden, places)
        cos, sin = (t[None, :, : t.shape[-1] // 2] for t in turn)
        context = {"cos": cos, "sin": sin, "mask": mask[None, None]}
        theirs = {"cu_seqlens": ends, "position_embeddings": turn}
        located = {"places": places.T, "extents": extents.T}
        made = {
            "patch_places": (feed, (places.T, extents.T, segments)),
            "patch_embedding": ({"pixel_values": colours}, (visual.patch_embed(colours)[None],)),
            "patch_positions": (
                {"hidden": hidden[None], **located},
                ((hidden + interpolated(grids, side, visual.pos_embed.weight))[None],),
            ),
            "patch_rotary": ({"places": places.T}, (cos, sin)),
            "segment_mask": ({"segments": segments}, (mask[None, None],)),
            "layer": ({"hidden": hidden[None], **context}, (first(hidden, **theirs)[None],)),
            "norm": ({"hidden": hidden[None]}, (first.norm1(hidden)[None],)),
            "attention": ({"normed": hidden[None], **context}, (first.attn(hidden, **theirs)[None],)),
            "mlp": ({"normed": hidden[None]}, (first.mlp(hidden)[None],)),
            "patch_merger": ({"hidden": hidden[None]}, (visual.merger(hidden),)),
        }
    return {n: ({p: np.ascontiguousarray(t) for p, t in fed.items()}, given) for n, (fed, given) in made.items()}


def test_every_block_of_the_tower_is_compared(tiny_checkpoint) -> None:
    config = open_checkpoint(tiny_checkpoint(CASE, "all")).config
    assert set(named_blocks(read_model(choose(None, config), config, part="vision"))) == set(BLOCKS)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_alone_matches_transformers(name: str, runner: str, known, exported) -> None:
    feed, expected = known[name]
    found = run_only(exported(CASE, block=name, part="vision"), runner, feed)
    for theirs, ours in zip(expected, found.values(), strict=True):
        check(theirs.numpy(), ours)


@pytest.mark.parametrize("side", [1, 2, 5, 6, 7, 48])
def test_positions_are_resampled_to_any_picture_from_a_table_of_any_side(side: int) -> None:
    module = blocks.module(spec.PatchPositions(side, 9, spec.patch_axis(MERGE**2)), torch.float32)
    table = torch.randn(side**2, 9, generator=torch.Generator().manual_seed(side))
    module.load_state_dict({"weight": table}, assign=True)
    for grid in ([[1, 2, 2]], [[1, 2, 12], [1, 10, 2]], [[2, 4, 6]], [[1, 2 * side, 2 * side]], [[1, 96, 30]]):
        grids = torch.tensor(grid)
        places, extents = get_vision_position_ids(grids, MERGE), grids[:, 1:].repeat_interleave(grids.prod(1), 0)
        with torch.no_grad():
            found = module(torch.zeros(1, len(places), 9), places.T, extents.T)[0]
        check(interpolated(grids, side, table).numpy(), found.numpy())
