"""What of an export and of a prompt `run` takes."""

from __future__ import annotations

import os
from collections.abc import Sequence

from llmexport.export.assembly import parts
from llmexport.export.exported import Export
from llmexport.export.spec import SEQUENCE, Attention, DynamicScaling, LongScaling, Rotary
from llmexport.run.errors import RunError
from llmexport.validate.feeds import beside, limits, sees
from llmexport.validate.pictures import Pictures, sight


def check_decoder(export: Export) -> None:
    """Raise RunError unless the export is a model that continues a text."""
    if export.block is not None:
        raise RunError(f"{export.folder} is one block, {export.block}, which gives no tokens: export the whole model")
    if len(export.graphs) == 1 and sees(export.graphs[0]):
        raise RunError(f"{export.folder} is the vision part alone, which gives no tokens: export it with --part all")
    if not any(g.carried for g in export.graphs):
        raise RunError(f"{export.arch} is an encoder, which reads a text and continues none: give a decoder")
    if unknown := [p.name for p in beside(export)]:
        raise RunError(f"the export also reads {', '.join(unknown)}, which no prompt says: it cannot be run from text")


def check_prompt(export: Export, ids: Sequence[int], pictures: Pictures | None = None) -> None:
    """Raise RunError on a prompt that the model does not take."""
    if not ids:
        raise RunError("the prompt is empty, it has no token that the model could continue: give some text")
    words = limits(export.blocks)["tokens"]
    if outside := [i for i in ids if not 0 <= i < words]:
        raise RunError(
            f"the prompt has token {outside[0]}, the model knows 0 to {words - 1}: is the tokenizer the model's own?"
        )
    if pictures is None and (alone := {*ids} & {*picture_tokens(export)}):
        raise RunError(
            f"the prompt has token {min(alone)}, which stands for a picture, and none is given: give it by --image or "
            "--video, or leave its placeholder out"
        )
    most = positions(export)
    if most and len(ids) > most:
        raise RunError(f"the prompt has {len(ids)} tokens, the model takes {most}: give a shorter one")


def positions(export: Export) -> int:
    """How many tokens the model takes, as its config, its static cache or its blocks say; 0 if none does."""
    most = [b.most[SEQUENCE] for b in export.blocks if SEQUENCE in b.most]
    trained = export.text_config.get("max_position_embeddings")
    if any(isinstance(b, Rotary) and isinstance(b.scaling, DynamicScaling) for b in export.blocks):
        trained = None  # whose angles are made for longer texts
    said = (trained, export.max_tokens, *most)
    return min((n for n in said if isinstance(n, int)), default=0)


def picture_tokens(export: Export) -> tuple[int, ...]:
    """The tokens that stand for pictures, which no answer has, as there is no picture behind them."""
    seen = sight(export.blocks)
    return seen.tokens if seen else ()


def run_again_at(export: Export) -> int | None:
    """The number of tokens beyond which LongRoPE turns by other angles, also keys that are cached by then."""
    for block in export.blocks:
        if isinstance(block, Rotary) and isinstance(block.scaling, LongScaling):
            return block.scaling.original_positions
    return None


def check_patches(export: Export, pictures: Pictures) -> None:
    """Raise RunError on a picture that takes the machine down: each of its patches scores all others, in fp32, unless
    scores are made some at a time; a mask of all pairs is there even so, once as bytes and once as numbers."""
    if pictures.grids is None:
        return
    height, width = max(((int(h), int(w)) for _, h, w in pictures.grids), key=lambda size: size[0] * size[1])
    seeing = [g for g in export.graphs if sees(g)]
    blocks = [p.block for g in seeing for step in g.assembly.steps for p in parts(step)]
    heads = max((b.heads for b in blocks if isinstance(b, Attention)), default=1)
    few = all("lower_whole_attention" in g.fusions and not g.fusions["lower_whole_attention"].refused for g in seeing)
    least = (2 if few else 4 * heads) * (height * width) ** 2
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if least > there:
        raise RunError(
            f"a picture of {height} x {width} patches takes {least / 1e9:.3g} GB of memory, this machine has "
            f"{there / 1e9:.3g} GB: give a smaller one, or lower longest_edge in preprocessor_config.json"
        )
