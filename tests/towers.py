"""Multimodal exports that are run graph by graph, without what `validate` does for that, beside transformers."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  teaches np.dtype "bfloat16"
import numpy as np
import onnxruntime
import torch
import transformers
from arch_cases import TOWERS, Case

from llmexport.export import manifest
from llmexport.export.exported import Export, ExportedGraph
from llmexport.validate.compare import compare
from llmexport.validate.runners import TorchRunner
from llmexport.validate.tolerance import TOLERANCE, Tolerance

Feed = dict[str, np.ndarray]
RUNNERS = ("torch", "onnxruntime")
# Heads as wide as published ones, which no power of two divides, and other sizes of all else.
WIDE = (
    Case("qwen3_5_moe", "qwen3_5_moe-heads-of-72", {
        "vision_config": {
            "hidden_size": 144, "depth": 1, "intermediate_size": 96, "num_position_embeddings": 49, "patch_size": 2,
            "temporal_patch_size": 3, "in_channels": 1, "spatial_merge_size": 3, "hidden_act": "gelu",
        },
    }),
    Case("llama4", "llama4-heads-of-88", {
        "vision_config": {
            "hidden_size": 176, "num_hidden_layers": 1, "intermediate_size": 2816, "image_size": 24, "patch_size": 3,
            "num_channels": 1, "pixel_shuffle_ratio": 0.25, "rope_parameters": {"rope_theta": 100.0},
        },
    }),
    Case("gemma3_text", "gemma3-heads-of-72", {
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 144, "num_hidden_layers": 1, "intermediate_size": 96,
            "num_attention_heads": 2, "image_size": 24, "patch_size": 2, "num_channels": 1, "hidden_act": "gelu",
            "layer_norm_eps": 1e-4, "vision_use_head": True,
        },
    }),
)  # fmt: skip
PACKED = tuple(c for c in TOWERS if c.arch.startswith("qwen3_5"))


@functools.cache
def reference(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    [name] = json.loads((folder / "config.json").read_text())["architectures"]
    made = getattr(transformers, name).from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return made.eval()


def pixels(folder: Path, pictures: np.ndarray | int, seed: int = 0) -> Feed:
    """Random pictures, as the vision graph reads them: grids in patches, or a number of tiles."""
    config = reference(folder).config.vision_config
    random = np.random.default_rng(seed)
    if isinstance(pictures, int):
        shape = (pictures, config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": random.standard_normal(shape, np.float32)}
    numbers = config.in_channels * config.temporal_patch_size * config.patch_size**2
    shape = (int(pictures.prod(1).sum()), numbers)
    return {"pixel_values": random.standard_normal(shape, np.float32), "grid_thw": pictures}


def seen(model: Any, feed: Feed) -> np.ndarray:
    """The features that transformers makes of pictures."""
    with torch.no_grad():
        colours = torch.from_numpy(feed["pixel_values"])
        if "grid_thw" in feed:
            made = model.model.get_image_features(colours, torch.from_numpy(feed["grid_thw"])).pooler_output
            return torch.cat(made).float().numpy()
        made = model.get_image_features(colours.to(model.dtype))
        if getattr(made, "pooler_output", None) is not None:
            return made.pooler_output.flatten(0, 1).float().numpy()
        return model.multi_modal_projector(made.last_hidden_state.flatten(0, 1)).float().numpy()


@functools.cache
def _session(file: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


@functools.cache
def _torch(folder: Path, name: str) -> TorchRunner:
    read = manifest.read(folder)
    runner = TorchRunner(read, next(g for g in read.graphs if g.name == name))
    runner.activate()
    return runner


def run(read: Export, graph: ExportedGraph, runner: str, feed: Mapping[str, np.ndarray]) -> Feed:
    if runner == "torch":
        return dict(_torch(read.folder, graph.name).infer(dict(feed), check_inputs=False))
    session = _session(read.folder / graph.file)
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feed)), strict=True))


def run_only(folder: Path, runner: str, feed: Mapping[str, np.ndarray]) -> Feed:
    """The graph of a block, or of what sees, alone."""
    read = manifest.read(folder)
    return run(read, read.graphs[0], runner, feed)


def check(expected: np.ndarray, found: np.ndarray, bound: Tolerance = TOLERANCE["float32"]) -> None:
    assert expected.shape == found.shape
    if expected.dtype.kind in "bi":
        assert np.array_equal(expected, found)
        return
    difference = compare(expected, found)
    assert difference.excess(bound) <= 1, str(difference)
    assert difference.scale > 0.1, "numbers near zero would prove nothing"


class Joined:
    """A multimodal export, run step by step; its own cache is carried."""

    def __init__(self, folder: Path, runner: str) -> None:
        self.read, self.runner = manifest.read(folder), runner
        self.vision, self.decoder = self.read.graphs
        self.ports = {p.name: p.typed(self.read.dtype) for p in self.decoder.assembly.inputs}
        self.past: Feed = {}

    def step(
        self, ids: np.ndarray, positions: np.ndarray, mask: np.ndarray, pictures: Feed | None = None
    ) -> np.ndarray:
        features = self.ports["image_features"]
        none = np.zeros((0, *features.shape[1:]), features.dtype)
        known = run(self.read, self.vision, self.runner, pictures) if pictures else {"image_features": none}
        known |= {"input_ids": ids, "position_ids": positions, "attention_mask": mask}
        sizes = {"batch": len(ids), "past": 0}
        for name in self.decoder.carried:
            port = self.ports[name]
            known[name] = self.past.get(name, np.zeros([sizes.get(d, d) for d in port.shape], port.dtype))
        made = run(self.read, self.decoder, self.runner, {n: known[n] for n in self.ports})
        self.past = {before: made[after] for before, after in self.decoder.carried.items()}
        return made["logits"]
