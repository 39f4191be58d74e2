"""`--target onnxruntime --cache static`: slots written in place, and the logits of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from decoders import Decoder, prompt, reference, theirs

from llmexport.export import archs, onnx_file
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.exported import Export
from llmexport.validate import validate

SLOTS, DECODE, PIECE = 59, 8, 3
# Layers that GroupQueryAttention takes, and those whose cache keeps a window and moves up.
LOWERED = {"llama": (3, 0), "qwen2": (3, 0), "qwen3": (3, 0), "gemma3_text": (1, 2), "cohere": (3, 0), "stablelm": (3, 0)}
LOWERED |= {"qwen3_5": (1, 0), "mixtral": (3, 0)}


@pytest.fixture
def lowered(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Export]:
    def make(arch: str, **kind: str) -> Export:
        checkpoint = open_checkpoint(tiny_checkpoint(arch))
        static = {"cache": "static", "max_tokens": SLOTS, **kind}
        request = onnx_file.Request(archs.load(arch), checkpoint, target="onnxruntime", **static)
        return onnx_file.write(request, tmp_path / "out")

    return make


@pytest.mark.parametrize("arch", LOWERED)
def test_slots_are_written_in_place_and_the_logits_are_those_of_transformers(arch, lowered, tiny_checkpoint):
    """Batch 2, left padding, a prompt beyond every window, decode steps, and a later piece of several tokens."""
    export = lowered(arch)
    fused = export.graphs[0].fusions["lower_static_attention"]
    print(arch, fused, export.graphs[0].fusions["lower_attention"])
    model, decoder = reference(tiny_checkpoint(arch)), Decoder(export.folder, "onnxruntime")
    ids, mask = prompt()
    positions, cache = np.maximum(mask.cumsum(-1) - 1, 0), None
    for step in range(DECODE + 2):
        made = theirs(model, ids, mask, positions, cache)
        cache = made.past_key_values
        found = decoder.step(ids, positions, np.pad(mask, ((0, 0), (0, SLOTS - mask.shape[1]))))
        decoder.check(made.logits.numpy(), found, mask.astype(bool) if step == 0 else None)
        ids = made.logits.numpy()[:, -1:].argmax(-1) if step < DECODE else prompt()[0][:, :PIECE]
        positions = positions[:, -1:] + 1 + np.arange(ids.shape[1])
        mask = np.concatenate((mask, np.ones_like(ids)), 1)
