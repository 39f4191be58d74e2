"""Tiny checkpoints in the layouts of published ones: within a multimodal model, experts as one tensor."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from llmexport.export import archs, random_checkpoint

# The smallest vision towers that transformers builds.
VISION: dict[str, dict[str, Any]] = {
    "llama4": {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        "vision_output_dim": 48,
        "projector_input_dim": 48,
        "projector_output_dim": 48,
    },
    "qwen3_5": {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 64,
        "num_position_embeddings": 16,
    },
}
VISION["qwen3_5_moe"] = VISION["qwen3_5"]
INDEX = "model.safetensors.index.json"


def randomise(model: Any) -> None:
    """Weights that keep the logits of order one, norms and biases spread, so that leaving one out shows."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            # A norm's weight is spread about where it starts.
            parameter.copy_(parameter + 0.2 * noise if parameter.ndim == 1 else 0.08 * noise)


def multimodal(arch: str, folder: Path) -> Path:
    """The architecture's tiny text model within its multimodal one, as transformers saves it."""
    import torch
    import transformers

    known = archs.load(arch)
    assert known.multimodal
    torch.manual_seed(0)
    model_class = getattr(transformers, known.multimodal[0].architecture)
    tiny = copy.deepcopy(dict(known.tiny))
    model = model_class(model_class.config_class(text_config=tiny, vision_config=dict(VISION[arch])))
    randomise(model)
    model.save_pretrained(folder, max_shard_size="200KB")
    return folder


def fuse_experts(source: Path, folder: Path) -> Path:
    """The same checkpoint with each layer's experts in two tensors, gate before up, as Qwen3.5 is published."""
    folder.mkdir()
    index = json.loads((source / INDEX).read_text())["weight_map"]
    tensors = {n: t for file in sorted(set(index.values())) for n, t in load_file(source / file).items()}
    found: dict[str, dict[int, dict[str, np.ndarray]]] = {}
    for name in list(tensors):
        match = re.fullmatch(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
        if match:
            expert = found.setdefault(match[1], {}).setdefault(int(match[2]), {})
            expert[match[3]] = tensors.pop(name)
    assert found
    for start, experts in found.items():
        matrices = [experts[e] for e in range(len(experts))]
        tensors[f"{start}.gate_up_proj"] = np.stack([np.concatenate((m["gate"], m["up"])) for m in matrices])
        tensors[f"{start}.down_proj"] = np.stack([m["down"] for m in matrices])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return folder


def mxfp4(folder: Path) -> Path:
    """A tiny GPT-OSS with its experts in 4 bits, the rest in bf16."""
    named = archs.load("gpt_oss")
    quantised = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    config = {**named.tiny, "quantization_config": quantised}
    random_checkpoint.write(named, folder, config=config, dtype="bfloat16", shard_bytes=50_000)
    return folder
