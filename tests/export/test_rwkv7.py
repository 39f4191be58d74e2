"""RWKV-7: its published config and tensors, what is refused, and its reference against the author's own package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published_configs import PUBLISHED
from tiny_configs import read, refusal

from llmexport.export import archs, random_checkpoint
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.onnx_file import read_model
from llmexport.export.spec import DeltaTimeMix, Embedding, Head, Layer, Norm, Presence, ShiftedMlp, Sublayer
from llmexport.export.stack import wired
from llmexport.validate import references

GOOSE = PUBLISHED["RWKV7-Goose-World3-1.5B-HF"]
# Logits of rwkv 0.8.32 from PyPI (RWKV_x070, "cpu fp32") of `weights()`, under the names of its .pth files.
LOGITS = json.loads((Path(__file__).parents[1] / "rwkv7_logits.json").read_text())
SMALL = {
    "vocab_size": 16,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "head_dim": 64,
    "decay_low_rank_dim": 12,
    "a_low_rank_dim": 10,
    "v_low_rank_dim": 8,
    "gate_low_rank_dim": 14,
    "hidden_act": "sqrelu",
    "norm_eps": 1e-5,
    "model_type": "rwkv7",
}


def test_a_published_config_is_read_to_the_last_number():
    norm = Norm(2048, 1e-5, statistics="layer", bias=True)

    def layer(first: bool) -> Layer:
        time = DeltaTimeMix(2048, 64, 96, 96, 64, 256, epsilon=64e-5, first=first)
        return Layer((Sublayer("attn", time, norm), Sublayer("ffn", ShiftedMlp(2048, 8192), norm)))

    layers = [(layer(i == 0), (Presence(),)) for i in range(24)]
    expected = wired(Embedding(65536, 2048, norm=norm), layers, Head(norm, 65536), tied=False)
    assert read_model(archs.choose(None, GOOSE), GOOSE) == expected


def test_a_checkpoint_holds_the_published_tensors(tmp_path):
    random_checkpoint.write(archs.load("rwkv7"), tmp_path / "ck", config=GOOSE, hollow=True)
    held = {n: tuple(t.shape) for n, t in open_checkpoint(tmp_path / "ck").tensors.items()}
    layer, name = "model.layers.23.", "model.layers.23.attn."
    assert {
        "model.embeddings.weight": (65536, 2048), "lm_head.weight": (65536, 2048), "model.norm.bias": (2048,),
        "model.layers.0.pre_norm.bias": (2048,), f"{layer}attn_norm.bias": (2048,), f"{layer}ffn_norm.weight": (2048,),
        f"{layer}ffn.x_k": (2048,), f"{layer}ffn.key.weight": (8192, 2048), f"{layer}ffn.value.weight": (2048, 8192),
        **{f"{name}x_{n}": (1, 1, 2048) for n in "rwkvag"}, **{f"{name}{n}": (2048,) for n in ("k_k", "k_a")},
        **{f"{name}{n}_proj.weight": (2048, 2048) for n in "rkvo"}, f"{name}r_k": (32, 64),
        f"{name}w_lora.lora.0.weight": (96, 2048), f"{name}w_lora.lora.2.weight": (2048, 96),
        f"{name}w_lora.lora.2.bias": (2048,), f"{name}v_lora.lora.0.weight": (64, 2048),
        f"{name}g_lora.lora.2.weight": (2048, 256), f"{name}g_norm.weight": (2048,), f"{name}g_norm.bias": (2048,),
    }.items() <= held.items()  # fmt: skip
    # The first layer has no values to mix with its own, but the norm of the embedding.
    assert len(held) == 24 * 33 - 3 + 2 + 4
    assert not any("layers.0.attn.v_lora" in n or "g_lora.lora.2.bias" in n for n in held)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"attn": {"layers": [1]}}, "attn is {'layers': [1]}"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"head_dim": 24}, "hidden_size 64 is not a multiple of head_dim 24"),
        ({"num_heads": 8}, "num_heads must be 4"),
        ({"value_dim": [64, 64, 128]}, "value_dim is [64, 64, 128], only hidden_size, 64"),
        ({"auto_map": {"AutoConfig": "native_model.NativeRWKV7Config"}}, "only the code of configuration_rwkv7"),
    ],
)
def test_a_config_of_something_else_is_refused(changes: dict[str, Any], why: str):
    assert why in refusal("rwkv7", **changes)


def test_a_width_that_no_key_says_follows_from_the_hidden_size():
    widths = {
        s.block.intermediate
        for model in (read("rwkv7", intermediate_size=None, hidden_ratio=3.3), read("rwkv7", intermediate_size=224))
        for step in model.steps
        if isinstance(step.block, Layer)
        for s in step.block.sublayers
        if isinstance(s.block, ShiftedMlp)
    }
    # 211 rounded up to a multiple of 32.
    assert widths == {224}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of every tensor of a small checkpoint numbers that follow from its name's place in the alphabet."""
    random_checkpoint.write(archs.load("rwkv7"), folder, config=SMALL, hollow=True)
    made = {}
    for i, (name, tensor) in enumerate(sorted(open_checkpoint(folder).tensors.items())):
        wave = np.sin(0.7 * i + 12.9898 * np.arange(np.prod(tensor.shape)) ** 1.1).reshape(tensor.shape)
        if ".x_" in name:
            wave = (wave + 1) / 2
        elif "w_lora.lora.2.bias" in name:
            wave = 3 * wave - 3
        elif name.endswith(("norm.weight", "k_k", "k_a")):
            wave = 1 + wave / 4
        else:
            wave = wave * 1.5 * tensor.shape[-1] ** -0.5
        made[name] = torch.from_numpy(wave.astype(np.float32))
    return made


def test_the_reference_is_the_authors_package(tmp_path):
    expected = torch.tensor(LOGITS["logits"], dtype=torch.float64)
    model = references.make("rwkv7", SMALL, weights(tmp_path / "ck"), torch.float32, None)
    found = model(torch.tensor([LOGITS["ids"]])).logits[0].double()
    assert expected.std() > 0.3
    assert (found - expected).abs().max() <= 1e-5
