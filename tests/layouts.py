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
from llmexport.export.spec import Multimodal

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
VISION["qwen3_vl"] = VISION["qwen3_5"] | {"deepstack_visual_indexes": [0]}
VISION["qwen2_5_vl"] = {k: v for k, v in VISION["qwen3_5"].items() if k != "num_position_embeddings"} | {
    "fullatt_block_indexes": [0],
    "window_size": 16,
}
VISION["qwen2_vl"] = {
    "depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2,
}  # fmt: skip
VISION["gemma3"] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4, "vision_use_head": False,
}  # fmt: skip
VISION["mistral3"] = {k: v for k, v in VISION["gemma3"].items() if k != "vision_use_head"} | {"head_dim": 16}
VISION["gemma4"] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "patch_size": 4,
    "position_embedding_size": 16,
}
# What the multimodal configs say beside the tiny text model's, and in it.
BESIDE: dict[str, dict[str, Any]] = {
    "gemma3": {"mm_tokens_per_image": 4},
    "mistral3": {"tie_word_embeddings": False},
    "qwen2_vl": {"tie_word_embeddings": True},
    "qwen2_5_vl": {"tie_word_embeddings": True},
}
MROPE: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"mrope_section": [2, 3, 3]},
    "qwen2_5_vl": {"mrope_section": [2, 3, 3]},
    "qwen3_vl": {"mrope_section": [4, 2, 2], "mrope_interleaved": True},
}
# The multimodal types, and the architecture of the text model in each.
WHOLE = {m.model_type: n for n in archs.names() for m in archs.load(n).multimodal}
INDEX = "model.safetensors.index.json"


def randomise(model: Any) -> None:
    """Weights that keep the logits of order one, norms and biases spread, so that leaving one out shows."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            # A norm's weight is spread about where it starts.
            parameter.copy_(parameter + 0.2 * noise if parameter.ndim == 1 else 0.08 * noise)
        saved = model.state_dict()
        for name, buffer in model.named_buffers():
            if name in saved and buffer.is_floating_point():
                buffer.add_(0.2 * torch.randn_like(buffer))
        for module in model.modules():
            # Where attention has no scale, the norm of q has it: larger logits would make 16 bits a toss.
            if getattr(module, "scaling", None) == 1.0 and hasattr(module, "q_norm"):
                module.q_norm.weight.mul_(module.head_dim**-0.5)


def outer(kind: str) -> Multimodal:
    return next(m for m in archs.load(WHOLE[kind]).multimodal if m.model_type == kind)


def multimodal(kind: str, folder: Path) -> Path:
    """The architecture's tiny text model within its multimodal one of this type, as transformers saves it."""
    import torch
    import transformers

    torch.manual_seed(0)
    model_class = getattr(transformers, outer(kind).architecture)
    tiny = copy.deepcopy(dict(archs.load(WHOLE[kind]).tiny))
    tiny["rope_parameters"] |= MROPE.get(kind, {})
    vision, beside = dict(VISION[kind]), BESIDE.get(kind, {})
    model = model_class(model_class.config_class(text_config=tiny, vision_config=vision, **beside))
    randomise(model)
    model.save_pretrained(folder, max_shard_size="200KB")
    return folder


def of_another_release(source: Path, folder: Path, kind: str) -> Path:
    """The same checkpoint, its tensors named as in the model itself: what transformers saved for some releases."""
    known = outer(kind)
    [names] = known.other_names
    starts = {known.names.get(n, n): names.get(n, n) for n in ("model.", "lm_head.")}
    starts |= {tower.removesuffix("*"): f"model.{tower}".removesuffix("*") for tower in known.left_out}
    tensors = {n: t for file in sorted(source.glob("*.safetensors")) for n, t in load_file(file).items()}

    def rename(name: str) -> str:
        start = next(s for s in starts if name.startswith(s))
        return starts[start] + name.removeprefix(start)

    folder.mkdir()
    save_file({rename(n): t for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return folder


def flat(source: Path, folder: Path) -> Path:
    """The same checkpoint, the text model's keys at the top of its config.json, as Qwen2-VL is published."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    text = config.pop("text_config")
    rope = {"type": "mrope", "mrope_section": text.pop("rope_parameters")["mrope_section"]}
    own = {k: v for k, v in text.items() if k not in ("model_type", "layer_types")}
    config |= {**own, "rope_scaling": rope, "rope_theta": 1000000.0}
    (folder / "config.json").write_text(json.dumps(config))
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
