"""Configs of vision towers: read as transformers reads them, or refused in one line that names the key."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import transformers
from arch_cases import TOWERS, Case
from tiny_configs import one_line
from towers import PACKED

from llmexport.export import archs
from llmexport.export.errors import ExportError
from llmexport.export.onnx_file import read_model
from llmexport.export.spec import Model

PATCHES, TILES, PICTURES = "qwen3_5_moe", "llama4", "gemma3_text"
REMOVED = object()


def whole(arch: str, beside: dict[str, Any], **vision: Any) -> dict[str, Any]:
    """The tiny config of the whole checkpoint with these keys of the tower, and those beside it, changed."""
    config = copy.deepcopy(dict(archs.tiny_config(archs.load(arch), "all")))
    for inner, changes in ((config, beside), (config["vision_config"], vision)):
        inner.update(changes)
        for key in [k for k, v in inner.items() if v is REMOVED]:
            del inner[key]
    return config


def read(arch: str, beside: dict[str, Any] | None = None, **vision: Any) -> Model:
    return read_model(archs.load(arch), whole(arch, beside or {}, **vision), part="all")


# What is asked, and what the line says of it.
BOTH: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "unread": ({}, {"window_size": 112}, "keys that this architecture does not understand: window_size=112"),
    "head size": ({}, {"head_dim": 24}, "does not understand: head_dim=24"),
    "null": ({}, {"hidden_size": None}, "hidden_size is null"),
    "empty list": ({}, {"patch_size": []}, r"patch_size is \[\], expected"),
    "two patch sizes": ({}, {"patch_size": [4, 2]}, r"patch_size is \[4, 2\], expected"),
    "activation": ({}, {"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'"),
    "RoPE of a type": ({}, {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "RoPE of type 'yarn'"),
    "RoPE of a share": ({}, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    "no RoPE": ({}, {"rope_theta": 0}, "rope_theta is 0"),
    "quantised": ({}, {"quantization_config": {"quant_method": "aqlm"}}, "the weights are quantised"),
    "no tower": ({"vision_config": None}, {}, "no 'vision_config': .*--part text"),
    "text alone": ({"language_model_only": True}, {}, "language_model_only=True"),
}
OF_PATCHES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "heads": ({}, {"num_heads": 3}, "hidden_size 32, no multiple of 3 heads"),
    "head of 6": ({}, {"hidden_size": 36, "num_heads": 6}, "a head size that 4 divides, .* makes it 6"),
    "deep stack": ({}, {"deepstack_visual_indexes": [1]}, r"deepstack_visual_indexes is \[1\]"),
    "table": ({}, {"num_position_embeddings": 35}, "num_position_embeddings 35, expected a square"),
    "width": ({}, {"out_hidden_size": 48}, "out_hidden_size 48, the text model hidden_size 64"),
    "default width": ({}, {"out_hidden_size": REMOVED}, "out_hidden_size 3584, the text model hidden_size 64"),
    "no such word": ({"image_token_id": 256}, {}, "token 256 stands for pictures, vocab_size is 256"),
    "default word": ({"video_token_id": REMOVED}, {}, "token 248057 stands for pictures"),
    "one word": ({"video_token_id": 250}, {}, "have one token, 250"),
    "null word": ({"image_token_id": None}, {}, "image_token_id is null"),
}
OF_TILES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "heads": ({}, {"num_attention_heads": 3}, "hidden_size 32, no multiple of 3 heads"),
    "head of 2": ({}, {"num_attention_heads": 16}, "a head size that 4 divides, .* makes it 2"),
    "patches": ({}, {"image_size": 25}, "image_size 25, no multiple of patch_size 4"),
    "oblong": ({}, {"image_size": [24, 48]}, r"image_size is \[24, 48\], expected"),
    "ratio": ({}, {"pixel_shuffle_ratio": 0.4}, "pixel_shuffle_ratio 0.4, expected 1 through a number"),
    "large ratio": ({}, {"pixel_shuffle_ratio": 2}, "pixel_shuffle_ratio 2"),
    "ratio of a side": ({}, {"pixel_shuffle_ratio": 0.25, "intermediate_size": 512}, "6 patches a side, which 4 must"),
    "intermediate": ({}, {"intermediate_size": 64}, r"intermediate_size 64, expected 2\*\*2 \* hidden_size"),
    "output": ({}, {"vision_output_dim": 64}, "projector_output_dim 48, but vision_output_dim 64"),
    "default output": ({}, {"vision_output_dim": REMOVED}, "projector_output_dim 48, but vision_output_dim 7680"),
    "adapter": ({}, {"projector_input_dim": 32}, "projector_output_dim 48, but projector_input_dim 32"),
    "bias": ({}, {"multi_modal_projector_bias": True}, "multi_modal_projector_bias is True"),
    "features": ({}, {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy is 'full'"),
    "feature layer": ({}, {"vision_feature_layer": -2}, "vision_feature_layer is -2"),
    "no such word": ({"image_token_index": 256}, {}, "token 256 stands for pictures, vocab_size is 256"),
    "other word": ({"image_token_id": 250}, {}, "image_token_id=250"),
}
OF_PICTURES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "unread": ({}, {"window_size": 112}, "keys that this architecture does not understand: window_size=112"),
    "RoPE": ({}, {"rope_theta": 10000.0}, "does not understand: rope_theta=10000.0"),
    "another tower": ({}, {"model_type": "siglip2_vision_model"}, "model_type is 'siglip2_vision_model'"),
    "heads": ({}, {"num_attention_heads": 3}, "hidden_size 32, no multiple of 3 heads"),
    "patches": ({}, {"image_size": 25}, "image_size 25, no multiple of patch_size 4"),
    "oblong": ({}, {"image_size": [24, 48]}, r"image_size is \[24, 48\], expected"),
    "activation": ({}, {"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'"),
    "no tower": ({"vision_config": None}, {}, "no 'vision_config': .*--part text"),
    "quantised": ({}, {"quantization_config": {"quant_method": "aqlm"}}, "the weights are quantised"),
    "no square of tokens": ({"mm_tokens_per_image": 8}, {}, "mm_tokens_per_image is 8, expected the square of a"),
    "no share of patches": ({"mm_tokens_per_image": 16}, {}, "is 16, expected .* that divides 6 patches"),
    "default tokens": ({"mm_tokens_per_image": REMOVED}, {}, "mm_tokens_per_image is 256, expected"),
    "no such word": ({"image_token_index": 256}, {}, "token 256 stands for pictures, vocab_size is 256"),
    "default word": ({"image_token_index": REMOVED}, {}, "token 262144 stands for pictures"),
    "other word": ({"image_token_id": 250}, {}, "image_token_id=250"),
}
REFUSED = [
    *((arch, *asked) for arch in (PATCHES, TILES) for asked in BOTH.values()),
    *((PATCHES, *asked) for asked in OF_PATCHES.values()),
    *((TILES, *asked) for asked in OF_TILES.values()),
    *((PICTURES, *asked) for asked in OF_PICTURES.values()),
]


@pytest.mark.parametrize(("arch", "beside", "vision", "line"), REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_a_tower_that_is_not_understood_is_refused(arch, beside, vision, line) -> None:
    with pytest.raises(ExportError, match=line) as error:
        read(arch, beside, **vision)
    one_line(error.value)


SAME = [
    (PATCHES, {"patch_size": [4, 4], "temporal_patch_size": [2, 2]}),
    (PATCHES, {"deepstack_visual_indexes": None, "rope_parameters": {"rope_type": "axial", "rope_theta": 10000}}),
    (PATCHES, {"rope_parameters": None, "model_type": "qwen3_5_moe", "attention_dropout": 0.1}),
    (TILES, {"patch_size": [4, 4], "image_size": [24, 24], "norm_eps": 0.5, "projector_dropout": 0.1}),
    (
        PICTURES,
        {"patch_size": [4, 4], "attention_dropout": 0.1, "layer_norm_eps": 1e-06, "hidden_act": "gelu_pytorch_tanh"},
    ),
    # A head gives something else of the same patches.
    (PICTURES, {"vision_use_head": True, "num_channels": 3}),
    (TILES, {"vision_feature_layer": -1, "rope_theta": 10000, "_attn_implementation_autoset": True}),
]


@pytest.mark.parametrize(("arch", "vision"), SAME, ids=str)
def test_what_changes_nothing_is_taken(arch, vision) -> None:
    assert read(arch, **vision) == read(arch)


@pytest.mark.parametrize("case", TOWERS, ids=str)
def test_a_key_that_is_missing_means_what_it_means_to_transformers(case: Case) -> None:
    """With the fewest keys that agree with the tiny text model."""
    named = archs.load(case.arch)
    config = dict(archs.tiny_config(named, "all"))
    fewest = {"vision_output_dim": 4096, "intermediate_size": 3072} if case.arch == TILES else {}
    config["vision_config"] = {"out_hidden_size": 64} if case in PACKED else fewest
    # The default of as many tokens is no share of the default of patches.
    config |= {"mm_tokens_per_image": 49} if case.arch == PICTURES else {}
    theirs = transformers.CONFIG_MAPPING[config["model_type"]](**copy.deepcopy(config)).to_dict()
    assert len(theirs["vision_config"]) > 10
    assert read_model(named, config, part="all") == read_model(named, theirs, part="all")
