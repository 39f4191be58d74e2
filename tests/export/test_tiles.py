"""Each block of a tower over tiles, exported alone, against the module of transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from towers import RUNNERS, check, pixels, reference, run_only
from transformers.models.llama4.modeling_llama4 import pixel_shuffle

from llmexport.export.archs import choose
from llmexport.export.assembly import named_blocks
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.onnx_file import read_model
from llmexport.export.spec import PixelShuffle

pytestmark = pytest.mark.model

ARCH, TILES = "llama4", 3
BLOCKS = (
    *("tile_embedding", "tile_rotary", "layer", "norm", "attention", "mlp"),
    *("pixel_shuffle", "projector"),
)


@pytest.fixture(scope="module")
def known(tiny_checkpoint) -> dict[str, tuple[dict[str, Any], tuple[Any, ...]]]:
    """What each block reads, and what transformers makes of it."""
    folder = tiny_checkpoint(ARCH, "all")
    model = reference(folder)
    vision = model.vision_model
    feed = pixels(folder, TILES)
    colours = torch.from_numpy(feed["pixel_values"])
    random = torch.Generator().manual_seed(0)
    hidden, shuffled = torch.randn(TILES, 37, 32, generator=random), torch.randn(TILES, 9, 48, generator=random)
    first = vision.model.layers[0]
    turn = vision.rotary_embedding(colours)
    cos, sin = (part.reshape(1, 37, 8).expand(TILES, -1, -1) for part in (turn.real, turn.imag))
    context = {"cos": cos, "sin": sin}
    with torch.no_grad():
        patches = vision.patch_embedding(colours)
        embedded = torch.cat((patches, vision.class_embedding.expand(TILES, 1, -1)), 1)
        made = {
            "tile_embedding": (feed, (embedded + vision.positional_embedding_vlm,)),
            "tile_rotary": (feed, (cos, sin)),
            "layer": ({"hidden": hidden, **context}, (first(hidden, turn)[0],)),
            "norm": ({"hidden": hidden}, (vision.layernorm_pre(hidden),)),
            "attention": ({"normed": hidden, **context}, (first.self_attn(hidden, turn)[0],)),
            "mlp": ({"normed": hidden}, (first.mlp(hidden),)),
            "pixel_shuffle": ({"hidden": hidden}, (vision.vision_adapter(hidden[:, :-1]),)),
            "projector": ({"hidden": shuffled}, (model.multi_modal_projector(shuffled).flatten(0, 1),)),
        }
    return {n: ({p: np.ascontiguousarray(t) for p, t in fed.items()}, given) for n, (fed, given) in made.items()}


def test_every_block_of_the_tower_is_compared(tiny_checkpoint) -> None:
    config = open_checkpoint(tiny_checkpoint(ARCH, "all")).config
    assert set(named_blocks(read_model(choose(None, config), config, part="vision"))) == set(BLOCKS)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_alone_matches_transformers(name: str, runner: str, known, exported) -> None:
    feed, expected = known[name]
    found = run_only(exported(ARCH, block=name, part="vision"), runner, feed)
    for theirs, ours in zip(expected, found.values(), strict=True):
        check(theirs.numpy(), ours)


def test_the_class_token_does_not_turn(known, exported) -> None:
    folder = exported(ARCH, block="tile_rotary", part="vision")
    cos, sin = run_only(folder, "onnxruntime", known["tile_rotary"][0]).values()
    assert (cos[:, -1] == 1).all()
    assert (sin[:, -1] == 0).all()
    assert (sin[:, :-1] != 0).all()


@pytest.mark.parametrize(("side", "merge"), [(6, 1), (6, 2), (6, 3), (8, 4), (24, 2)])
def test_a_pixel_shuffle_takes_rows_before_columns(side: int, merge: int) -> None:
    """Numbers that say where they were: the block's order of them, before its matrices, is transformers'."""
    from llmexport.export.blocks.tiles import shuffle

    hidden = torch.arange(2 * side**2 * 5).reshape(2, side**2, 5)
    found = shuffle(hidden, PixelShuffle(side, merge, 5, 7))
    assert torch.equal(found, pixel_shuffle(hidden, 1 / merge))
